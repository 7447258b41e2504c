"""``plinth finance rows`` and ``adopt``: from a history to a smaller model that may answer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from plinth.engine import ConfigError, ModelStore
from plinth.engine.files import replace_file
from plinth.pipelines.cli.finance.retraining import files_of, new_version, show_specs
from plinth.pipelines.console import say, written_anew
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.settings import STORE, FraudSettings
from plinth.verticals.finance.succession.champion import NAME
from plinth.verticals.finance.training.adopt import Adoption, adopt
from plinth.verticals.finance.training.history import FIRST_RECORDED, Data, recorded


def adopt_weights(settings: FraudSettings, history: Sequence[Path], wanted: Adoption) -> str:
    """Store given weights as a version, with what hangs on them; returns the version.

    Raises:
        PlinthError: the history cannot be read or used, or the weights cannot.
    """
    store = settings.store or STORE
    named = replace(wanted, version=wanted.version or new_version())
    specs = adopt(_read(settings, history), store, named)
    show_specs(named.version, specs)
    size = ModelStore(store).size(NAME, named.version)
    say(
        f"{NAME} {named.version} stored, {size / 1e3:.1f} kB of weights; it answers after "
        f"plinth finance promote {named.version}"
    )
    return named.version


def write_rows(
    settings: FraudSettings, history: Sequence[Path], out: Path, days: int, label_days: int
) -> None:
    """Features of the newest payments whose labels are due, and the labels, as a .npz file.

    Raises:
        PlinthError: the history cannot be read or is too short, or the file cannot be written.
    """
    data = _read(settings, history)
    last = data.days - 2 - label_days
    if last < FIRST_RECORDED:
        needed = data.days + FIRST_RECORDED - last
        raise ConfigError(
            f"there are {data.days} days of payments, {needed} are needed",
            hint=f"{FIRST_RECORDED} fill the windows of the features; bring more",
        )
    models = ModelStore(settings.store or STORE)
    spec = models.verify(NAME)
    columns = Columns.of(data.features, models.facts(NAME), f"{NAME} {spec.version}")
    first = max(FIRST_RECORDED, last - days + 1)
    chosen = data.between(first, last + 1 - first)
    if not len(chosen):
        raise ConfigError(
            f"no payment lies in days {first} to {last} of the history",
            hint="is the event_time of its first or last payment right?",
        )
    (given,) = spec.inputs
    fraud = data.table["fraud"][chosen]
    written = io.BytesIO()
    np.savez(written, **{given.name: columns.seen(data.rows[chosen]), "labels": fraud})  # type: ignore[arg-type]
    with written_anew(out, if_there="choose another with --out"):
        replace_file(out, written.getvalue())
    say(f"{len(chosen):,} payments of {last + 1 - first} days, {int(fraud.sum()):,} frauds: {out}")


def _read(settings: FraudSettings, history: Sequence[Path]) -> Data:
    return recorded(files_of(history), settings.rates, lambda done: None, settings.program())
