"""``plinth finance retrain``: a new version from the newest labels, now and then."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from plinth.engine import ConfigError, ModelSpec, ModelStore, PlinthError
from plinth.pipelines.console import say, show_table
from plinth.verticals.finance.settings import STORE, FraudSettings
from plinth.verticals.finance.succession.champion import NAME, WINDOW, Champion
from plinth.verticals.finance.training.history import recorded
from plinth.verticals.finance.training.retrain import Plan, retrain, window_of

log = logging.getLogger("plinth.retrain")

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
NICE = 10
"""Training makes way for whatever else runs."""


def seconds_of(text: str) -> float:
    """Seconds from ``90s``, ``30m``, ``1h`` or ``1d``.

    Raises:
        ConfigError: it is no such time, or below a second.
    """
    try:
        found = float(text[:-1]) * UNITS[text[-1:]]
    except (ValueError, KeyError):
        found = 0.0
    if not 1 <= found <= 366 * 86_400:
        raise ConfigError(f"--every {text}: expected a time such as 30m, 1h or 1d")
    return found


def files_of(history: Sequence[Path]) -> list[Path]:
    """The files that were named, and those that lie in the folders that were.

    Raises:
        ConfigError: a folder has none.
    """
    found: list[Path] = []
    for path in history:
        inside = sorted({*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")}) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise ConfigError(f"there is no *.jsonl or *.jsonl.gz in {path}")
        found += inside or [path]
    return found


def new_version() -> str:
    """The name of a version that is made now."""
    return f"{datetime.now(UTC):%Y%m%d.%H%M%S}"


def show_specs(title: str, specs: Sequence[ModelSpec]) -> None:
    """What the models of a version are worth, as a table."""
    rows = [
        (name, *(f"{spec.metrics[name]:.4f}" for spec in specs))
        for name in sorted(specs[0].metrics)
    ]
    show_table(title, ("measure", *(spec.name for spec in specs)), rows)


def train_once(settings: FraudSettings, history: Sequence[Path], plan: Plan) -> str | None:
    """Train and store a version; ``None``: the newest was trained on the same payments.

    Raises:
        PlinthError: the history cannot be read or is too short, or the store cannot be written.
    """
    store = settings.store or STORE
    begun = time.monotonic()
    data = recorded(files_of(history), settings.rates, lambda done: None, settings.program())
    models, window = ModelStore(store), window_of(data, plan)
    known = models.versions(NAME)
    if known and models.facts(NAME, known[-1]).get(WINDOW) == window:
        say(f"no other payments or labels than {NAME} {known[-1]} was trained on")
        return None
    version = new_version()
    names = ", ".join(path.name for path in history)
    specs = retrain(
        data,
        plan,
        store,
        version=version,
        source=f"plinth finance retrain {names}",
        advance=lambda done: None,
    )
    ends = [
        f"{datetime.fromtimestamp(window[name] / 1e3, UTC):%Y-%m-%d}" for name in ("from", "to")
    ]
    show_specs(f"{version}: {ends[0]} to {ends[1]}", specs)
    say(
        f"{NAME} {version} stored after {time.monotonic() - begun:.0f} s; "
        f"{Champion(store).version() or version} answers"
    )
    return version


def train_on(
    settings: FraudSettings,
    history: Sequence[Path],
    plan: Plan,
    every: float,
    stop: threading.Event,
) -> None:
    """Train again and again; what fails is logged, and the next time tries again.

    Args:
        settings: of the vertical.
        history: files, or folders of files, that are read anew each time.
        plan: how to train.
        every: seconds from one beginning to the next.
        stop: ends it, between two trainings.
    """
    os.nice(NICE)
    torch.set_num_threads(1)
    while not stop.is_set():
        begun = time.monotonic()
        try:
            train_once(settings, history, plan)
        except PlinthError as error:
            log.error("nothing was trained, what answers stays: %s", error)
        except Exception:
            log.exception("nothing was trained, what answers stays")
        stop.wait(max(0.0, begun + every - time.monotonic()))
