"""Whether payments still look like those that a model was trained on.

The store keeps with each model how its features and its score were distributed
(:class:`Reference`). :class:`DriftWatch` counts what is scored by the same bins, and holds every
window of full days against it by the population stability index:

    PSI = sum over bins of (now - then) * ln(now / then), with shares of payments

The usual reading: below 0.1 stable, above 0.25 shifted (N. Siddiqi, Credit Risk Scorecards, 2006).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from prometheus_client import Gauge
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from plinth.engine import ModelError
from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.online import Batch, FeatureState, Flag
from plinth.verticals.finance.features.program import STANDARD
from plinth.verticals.finance.features.timeline import DAY

log = logging.getLogger(__name__)

SCORE = "score"
"""Its name among those of the features."""
FACT = "reference"
"""Under this name the store keeps a reference with its model."""
QUANTILES = (*np.linspace(0.1, 0.9, 9).tolist(), 0.99)
"""Where bins end; the last hundredth has one of its own, since alerts lie there."""
MIN_PAYMENTS = 2_000
"""Of a window; of fewer, chance alone gives noticeable indices."""
MIN_LABELS = 50
"""Expected, before it is judged whether they come."""
BLOCK = 4_096
"""Payments that are counted at once."""

PSI = Gauge(
    "plinth_finance_drift_psi",
    "Population stability index of a feature, or of the score, over the newest full days.",
    ("feature",),
    registry=REGISTRY,
)
SHIFTED = Gauge(
    "plinth_finance_drift_shifted",
    "Features, the score among them, whose index is above drift_alarm. Above 0 is an alarm.",
    registry=REGISTRY,
)
UNTIL = Gauge(
    "plinth_finance_drift_until_seconds",
    "End of the days that plinth_finance_drift_psi is of, event time, seconds since 1970.",
    registry=REGISTRY,
)
MISSING = Gauge(
    "plinth_finance_missing_label_share",
    "Share of the frauds that the training data would have labelled by now and nobody did; above "
    "missing_labels_alarm is an alarm.",
    registry=REGISTRY,
)

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
_STANDARD = Columns.all(STANDARD)
_PARTIAL, _DUPLICATE = Flag.PARTIAL.value, Flag.DUPLICATE.value


class Bins(BaseModel):
    """How one column was distributed, on weekdays and on weekends.

    Args:
        edges: ascending; bin i holds what is above edge i - 1, up to edge i.
        weekdays, weekends: payments in each bin, one bin more than edges.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    edges: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=100)]
    weekdays: list[Annotated[int, Field(ge=0)]]
    weekends: list[Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _check(self) -> Bins:
        sizes = {len(self.weekdays), len(self.weekends)}
        if sizes != {len(self.edges) + 1} or self.edges != sorted(set(self.edges)):
            raise ValueError("expected ascending edges, and one count more")
        return self

    def expected(self, payments: int, weekend: int) -> Floats:
        """Shares of the bins where so many of the payments lie on a weekend."""
        kinds = [np.array(self.weekdays, float), np.array(self.weekends, float)]
        both = kinds[0] + kinds[1]
        weekdays, weekends = (kind if kind.sum() else both for kind in kinds)
        share = weekend / payments
        return (1 - share) * _shares(weekdays) + share * _shares(weekends)


class Reference(BaseModel):
    """How the payments of a model's training were distributed, and its scores of them.

    Args:
        payments: how many.
        fraud_share: labelled as frauds, of them.
        bins: by the names of the features, and of the score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    payments: Annotated[int, Field(ge=1)]
    fraud_share: Annotated[float, Field(ge=0, le=1)]
    bins: dict[str, Bins]

    @classmethod
    def of(
        cls,
        rows: Floats,
        scores: Floats,
        fraud: npt.NDArray[np.bool_],
        names: Sequence[str] = STANDARD.model_names,
    ) -> Reference:
        """The reference of payments.

        Args:
            rows: (n, features).
            scores: (n,) of the model; fraud: (n,) as labelled.
            names: of the columns of ``rows``.
        """
        table = np.column_stack((rows, scores)).astype(np.float32)
        weekend = _weekend(rows, names)
        bins = {}
        for name, column in zip((*names, SCORE), table.T, strict=True):
            edges = np.unique(np.quantile(column, QUANTILES, method="lower"))
            kinds = [_counts(edges, column[kind]) for kind in (~weekend, weekend)]
            told = {"weekdays": kinds[0].tolist(), "weekends": kinds[1].tolist()}
            bins[name] = Bins(edges=edges.astype(float).tolist(), **told)
        return cls(payments=len(table), fraud_share=float(fraud.mean()), bins=bins)

    @classmethod
    def read(
        cls,
        facts: Mapping[str, Any],
        model: str,
        names: Sequence[str] = STANDARD.model_names,
    ) -> Reference | None:
        """The one that the store has for a model; ``None``: it has none.

        Args:
            facts: of the model, from the store.
            model: its name and version, for the error.
            names: of its features.

        Raises:
            ModelError: it is damaged, or of other features.
        """
        found = facts.get(FACT)
        if found is None:
            return None
        try:
            made = cls.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, (FACT, *first["loc"])))
            raise ModelError(f"{model}: {place}: {first['msg']}", hint="train it again") from None
        if other := sorted(set(made.bins) ^ {*names, SCORE}):
            raise ModelError(
                f"{model}: {FACT} is of other features: {', '.join(other)}", hint="train it again"
            )
        return made


def _weekend(rows: Floats, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which rows (n, features) lie on a weekend, as far as the features tell."""
    if "weekend" not in names:
        return np.zeros(len(rows), bool)
    return np.asarray(rows[:, tuple(names).index("weekend")] > 0)


def _counts(edges: Floats, column: Floats) -> Counts:
    return np.bincount(np.searchsorted(edges, column), minlength=len(edges) + 1)


def _shares(counts: Floats) -> Floats:
    """Half a payment more in each bin keeps an index finite."""
    halves = counts + 0.5
    return np.asarray(halves / halves.sum())


def share_of(edges: Floats, column: Floats) -> Floats:
    """Shares (bins,) of a column's values (n,) between edges, all above 0."""
    return _shares(_counts(edges, column).astype(float))


def stability_index(now: Floats, then: Floats) -> float:
    """PSI of two distributions over the same bins, shares that are all above 0."""
    return float(((now - then) * np.log(now / then)).sum())


class DriftWatch:
    """Holds what is scored against the reference of the model that scores it.

    A window is full days of event time, as many as give :data:`MIN_PAYMENTS`: part of a day would
    take the night for a shift. Weekends are held against weekends. A column is left out until the
    state has seen as much history as it looks back on.

    Args:
        reference: of the model.
        alarm: index above which a column is shifted.
        missing_alarm: share of missing labels above which they are not coming.
        columns: what the model sees.

    Attributes:
        indices: by column, of the last window; shifted: those of them above the alarm.
    """

    def __init__(
        self,
        reference: Reference,
        alarm: float,
        missing_alarm: float,
        columns: Columns = _STANDARD,
    ) -> None:
        self._reference, self._columns = reference, columns
        self._reach = max(columns.program.reaches[name] for name in columns.names)
        self.alarm, self._missing_alarm = alarm, missing_alarm
        self._edges = [np.array(reference.bins[name].edges, np.float32) for name in self.names]
        self.indices: dict[str, float] = {}
        self.shifted: dict[str, float] = {}
        self.labels_missing = False
        self._waiting: list[tuple[Batch, Floats]] = []
        self.begin_anew()

    @property
    def names(self) -> tuple[str, ...]:
        """What is watched: the features that the model sees, and its score."""
        return (*self._columns.names, SCORE)

    def begin_anew(self) -> None:
        """Forget what was counted and not yet judged: the state is another one now."""
        self._waiting.clear()
        self._rows = 0
        self._day = self._since = -1
        self._labels = 0
        self._expected = 0.0
        self._begin(-1)

    def _begin(self, day: int) -> None:
        """Begin a window; -1: it began within a day, and will not be judged."""
        self._first = day
        self._payments = self._weekend = 0
        self._counts = [np.zeros(len(edges) + 1, np.int64) for edges in self._edges]

    def take(
        self, times: Sequence[int], batch: Batch, output: Floats, state: FeatureState, since: int
    ) -> None:
        """Count payments; about a microsecond each where they come in tens.

        Args:
            times: event times of the first payment and the last, milliseconds.
            batch: their features.
            output: float32 (n, 2) of the model: score, and 0 where no cheaper variant gave it.
            state: that made the features.
            since: milliseconds; what lies before is not in the state.
        """
        day = max(times) // DAY
        if day != self._day:
            self._turn(day, state, since)
        self._waiting.append((batch, output))
        self._rows += len(output)
        if self._rows >= BLOCK:
            self._count()

    def label(self, count: int) -> None:
        """So many payments became known as frauds, in the flow whose payments were taken."""
        self._labels += count

    def _turn(self, day: int, state: FeatureState, since: int) -> None:
        """A day is over; what comes late for it counts in the next."""
        if day < self._day:
            return
        self._count()
        if self._first >= 0 and self._payments >= MIN_PAYMENTS:
            self._judge(day)
            self._begin(day)
        elif self._day < 0:
            oldest = (card.times[0] for card in state.cards.items.values() if card.times)
            self._since = min(oldest, default=day * DAY)
        elif self._first < 0:
            self._begin(day)
        self._since = max(self._since, since)
        self._day = day

    def _count(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate([batch.rows for batch, _ in self._waiting])
        flags = np.concatenate([batch.flags for batch, _ in self._waiting])
        output = np.concatenate([output for _, output in self._waiting])
        self._waiting.clear()
        self._rows = 0
        kept = (output[:, 1] == 0) & ((flags & (_PARTIAL | _DUPLICATE)) == 0)
        rows, scores = self._columns.seen(rows[kept]), output[kept, 0]
        columns = (*rows.T, scores)
        for counts, edges, column in zip(self._counts, self._edges, columns, strict=True):
            counts += _counts(edges, np.ascontiguousarray(column))
        self._payments += len(scores)
        self._weekend += int(_weekend(rows, self._columns.names).sum())

    def _judge(self, day: int) -> None:
        """Hold the window, which ends before this day, against the reference."""
        start, bins = self._first * DAY, self._reference.bins
        found = {}
        reaches = {**self._columns.program.reaches, SCORE: self._reach}
        for name, counts in zip(self.names, self._counts, strict=True):
            if start >= self._since + reaches[name]:
                expected = bins[name].expected(self._payments, self._weekend)
                found[name] = stability_index(_shares(counts.astype(float)), expected)
                PSI.labels(name).set(found[name])
        before, self.indices = self.shifted, found
        self.shifted = {name: value for name, value in found.items() if value > self.alarm}
        SHIFTED.set(len(self.shifted))
        UNTIL.set(day * DAY / 1e3)
        worst = sorted(self.shifted.items(), key=lambda one: -one[1])
        if self.shifted.keys() - before.keys():
            log.error(
                "payments are not like those of the model's training (PSI above %g): %s",
                self.alarm,
                ", ".join(f"{name} {value:.2f}" for name, value in worst),
            )
        elif before and not self.shifted:
            log.info("payments are like those of the model's training again")
        if "score" in found:
            self._judge_labels()
        else:
            self._labels = 0

    def _judge_labels(self) -> None:
        self._expected += self._payments * self._reference.fraud_share
        if self._expected < MIN_LABELS:
            return
        share = max(0.0, 1 - self._labels / self._expected)
        MISSING.set(share)
        before, self.labels_missing = self.labels_missing, share > self._missing_alarm
        if self.labels_missing and not before:
            log.error(
                "%d frauds were labelled where the training data has about %d: labels do not come",
                self._labels,
                round(self._expected),
            )
        self._labels, self._expected = 0, 0.0
