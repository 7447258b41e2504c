"""A second version of the model scores what the champion scored, and is held against it.

Nothing of it is in anybody's way: the flow only leaves its rows here, and they are scored
without a deadline, when the device has time. What does not fit the queue is left out and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from prometheus_client import Counter, Gauge
from pydantic import Field
from torch import Tensor

from plinth.engine import Call, Flow, ModelError, PlinthError
from plinth.engine.metrics import REGISTRY
from plinth.engine.optimize.measures import average_precision
from plinth.engine.tables import Table
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.online import Batch, Flag
from plinth.verticals.finance.features.program import STANDARD
from plinth.verticals.finance.features.timeline import DAY, NEVER, milliseconds
from plinth.verticals.finance.schema import Label, Payment
from plinth.verticals.finance.succession.drift import QUANTILES, share_of, stability_index

MAX_WAITING = 16_384
"""Payments that wait to be scored in shadow."""
MAX_ROWS = 512
"""Of one call in shadow."""
GROWS = 2.0
"""So many alerts, and so many payments declined, for one of the champion's a challenger may have,
unless the rule says a share."""
COSTS = 1_024
"""Calls whose cost is remembered."""

MEASURES = Gauge(
    "plinth_finance_challenger",
    "The challenger beside the champion on the same payments, by measure; see docs/finance.md.",
    ("measure",),
    registry=REGISTRY,
)
SCORED = Counter(
    "plinth_finance_challenger_payments_total",
    "Payments that the challenger was asked for; outcome: scored, or left_out for lack of time.",
    ("outcome",),
    registry=REGISTRY,
)

Scores = npt.NDArray[np.float32]
_PAYMENT = np.dtype(
    [("key", np.uint64), ("time", np.int64), ("champion", np.float32), ("challenger", np.float32)]
)
_LABEL = np.dtype([("key", np.uint64), ("fraud", np.bool_)])
_NOT_COUNTED = Flag.DUPLICATE.value


class Promotion(Table):
    """The rule by which a challenger becomes the champion: all of it must hold.

    Args:
        min_labelled: payments of which is known whether they are frauds.
        min_frauds: of them.
        min_ap_gain: average precision of the challenger less that of the champion.
        max_alert_share: share of payments from the challenger's own ``review_threshold`` on;
            absent: twice that of the champion.
        max_decline_share: and from its own ``decline_threshold`` on; absent: twice likewise.
        max_cost_us: device microseconds of a payment, 99th percentile over calls in shadow.
        label_days: a payment this old without a label is genuine.
    """

    min_labelled: Annotated[int, Field(ge=1)] = 10_000
    min_frauds: Annotated[int, Field(ge=1)] = 50
    min_ap_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0
    max_alert_share: Annotated[float, Field(gt=0, le=1)] | None = None
    max_decline_share: Annotated[float, Field(gt=0, le=1)] | None = None
    max_cost_us: Annotated[float, Field(gt=0)] | None = None
    label_days: Annotated[float, Field(ge=0, le=90)] = 7.0

    def unmet(self, figures: Mapping[str, float]) -> list[str]:
        """What keeps the challenger from being promoted; empty: nothing."""
        found = []
        for name, least in (("labelled", self.min_labelled), ("frauds", self.min_frauds)):
            if figures[name] < least:
                found.append(f"{name}: {figures[name]:,.0f}, at least {least:,} are needed")
        gain = figures.get("ap_gain")
        if gain is None or not gain > self.min_ap_gain:
            told = "unknown" if gain is None else f"{gain:+.4f}"
            found.append(f"ap_gain: {told}, more than {self.min_ap_gain:+g} is needed")
        if figures.get("challenger_recall_own") == 0:
            found.append("challenger_recall_own: 0, from its own threshold on it finds no fraud")
        for name, most in (
            ("challenger_alert_share", _most(self.max_alert_share, figures, "alert")),
            ("challenger_decline_share", most_declined(self, figures)),
            ("cost_us", self.max_cost_us),
        ):
            value = figures.get(name)
            if most is not None and (value is None or not value <= most):
                told = "unknown" if value is None else f"{value:g}"
                found.append(f"{name}: {told}, at most {most:g} is allowed")
        return found


def _most(said: float | None, figures: Mapping[str, float], what: str) -> float:
    """Share of payments that may be alerts, or be declined."""
    return GROWS * figures.get(f"champion_{what}_share", 0.0) if said is None else said


def most_declined(rule: Promotion, figures: Mapping[str, float]) -> float:
    """Share of payments that a challenger may decline by its score, as the figures are."""
    return _most(rule.max_decline_share, figures, "decline")


class Thresholds(NamedTuple):
    """From which scores on a version asks for a review, and declines."""

    review: float
    decline: float


class Pair(NamedTuple):
    """Scores of the same payments by two versions.

    Args:
        champion, challenger: (n,) scores.
        thresholds: of each of them.
    """

    champion: Scores
    challenger: Scores
    thresholds: tuple[Thresholds, Thresholds]


def compare(pair: Pair, fraud: npt.NDArray[np.int8]) -> dict[str, float]:
    """Two versions on the same payments.

    The alert budget is what the champion alerts on: the same number of the challenger's highest
    scores is compared with it.

    Args:
        pair: their scores; at least one payment.
        fraud: (n,) 1 or 0 where it is known, else -1.

    Returns:
        Figures by name; those that need labels only where frauds and genuine payments are known.
    """
    old, new, (theirs, own) = pair
    alerts = old >= theirs.review
    budget = int(alerts.sum())
    highest = _highest(new, budget)
    edges = np.unique(np.quantile(old, QUANTILES, method="lower"))
    known = fraud >= 0
    frauds = int((fraud == 1).sum())
    figures = {
        "payments": float(len(old)),
        "labelled": float(known.sum()),
        "frauds": float(frauds),
        "champion_alert_share": float(alerts.mean()),
        "challenger_alert_share": float((new >= own.review).mean()),
        "champion_decline_share": float((old >= theirs.decline).mean()),
        "challenger_decline_share": float((new >= own.decline).mean()),
        "psi": stability_index(share_of(edges, new), share_of(edges, old)),
    }
    if budget:
        figures["alerts_in_common"] = float((alerts & highest).sum() / budget)
    if not frauds or frauds == known.sum():
        return figures
    truth = fraud[known] == 1
    figures["challenger_recall_own"] = int((new[known] >= own.review)[truth].sum()) / frauds
    for name, scores, chosen in (("champion", old, alerts), ("challenger", new, highest)):
        hits = int((chosen[known] & truth).sum())
        figures[f"{name}_ap"] = average_precision(truth, scores[known])
        figures[f"{name}_recall"] = hits / frauds
        if chosen[known].any():
            figures[f"{name}_precision"] = hits / int(chosen[known].sum())
    figures["ap_gain"] = figures["challenger_ap"] - figures["champion_ap"]
    return figures


def _highest(scores: Scores, count: int) -> npt.NDArray[np.bool_]:
    """Which are the ``count`` highest; the first of equal ones."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


class _Ring:
    """The newest rows of a structured array, in any order.

    Args:
        dtype: of a row; ``size``: rows kept.
    """

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        self._rows = np.zeros(size, dtype)
        self._next = self._count = 0

    def put(self, rows: npt.NDArray[Any]) -> None:
        size = len(self._rows)
        rows = rows[-size:]
        self._rows[(self._next + np.arange(len(rows))) % size] = rows
        self._next = (self._next + len(rows)) % size
        self._count = min(self._count + len(rows), size)

    def rows(self) -> npt.NDArray[Any]:
        """Oldest first."""
        first = self._next if self._count == len(self._rows) else 0
        return np.roll(self._rows[: self._count], -first)


class _Offer(NamedTuple):
    """Payments as the champion scored them: (n, 22) features, (n, 2) score and variant."""

    asked: Sequence[Payment]
    batch: Batch
    output: npt.NDArray[np.float32]


class Shadow:
    """Payments that two versions scored, the newest ``payments`` of them, and their labels.

    :meth:`offer` and :meth:`note` may be called by another thread than the rest.

    Args:
        model: name of the challenger in the engine.
        thresholds: of champion and challenger.
        payments: remembered at most, 24 bytes each, and as many labels, 9 bytes each.
        share: of cards whose payments are scored, above 0 to 1.
        since: milliseconds; payments up to this event time are left out, since one of the two may
            have been trained on them.
        columns: what the challenger sees; by default all of the standard features.
    """

    def __init__(
        self,
        model: str,
        thresholds: tuple[Thresholds, Thresholds],
        payments: int,
        share: float,
        since: int = NEVER,
        columns: Columns | None = None,
    ) -> None:
        self._model, self._thresholds = model, thresholds
        self._below = round(share * (1 << 32))
        self._since, self._columns = since, columns or Columns.all(STANDARD)
        self._offers: deque[_Offer] = deque()
        self._waiting = self._taken = 0  # of each only one thread writes
        self._noted: deque[Label] = deque(maxlen=payments)
        self._payments = _Ring(_PAYMENT, payments)
        self._labels = _Ring(_LABEL, payments)
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._asked = 0

    def offer(
        self, asked: Sequence[Payment], batch: Batch, output: npt.NDArray[np.float32]
    ) -> None:
        """Leave payments to be scored: an entry of a queue, whatever their number.

        Args:
            asked: the payments.
            batch: their features.
            output: (n, 2): the champion's score, and 0 where no cheaper variant gave it; what
                that gave is not compared.
        """
        count = len(asked)
        if self._waiting - self._taken + count > MAX_WAITING:
            SCORED.labels("left_out").inc(count)
            return
        self._waiting += count
        self._offers.append(_Offer(asked, batch, output))

    def note(self, label: Label) -> None:
        """Take in what became known of a payment."""
        self._noted.append(label)

    def flow(self) -> Flow[None] | None:
        """Score some of what waits; ``None``: nothing waits."""
        self._take_labels()
        return self._score() if self._offers else None

    def _score(self) -> Flow[None]:
        rows, payments = self._next_rows()
        if not len(payments):
            return
        try:
            output: Tensor = yield Call(self._model, torch.from_numpy(rows))
        except PlinthError:
            SCORED.labels("left_out").inc(len(payments))
            raise
        payments["challenger"] = output[:, 0].float().numpy()
        if not np.isfinite(payments["challenger"]).all():
            SCORED.labels("left_out").inc(len(payments))
            raise ModelError(f"{self._model} gave scores that are no numbers")
        self._payments.put(payments)
        self._asked = len(payments)
        SCORED.labels("scored").inc(len(payments))

    def _next_rows(self) -> tuple[Scores, npt.NDArray[Any]]:
        """Rows of one call, (n, features), and what is remembered of them."""
        rows: list[Scores] = []
        told: list[tuple[int, int, float, float]] = []
        while self._offers and len(told) < MAX_ROWS:
            asked, batch, output = self._offers.popleft()
            self._taken += len(asked)
            counted = ((batch.flags & _NOT_COUNTED) == 0) & (output[:, 1] == 0)
            chosen = [
                place
                for place, one in enumerate(asked)
                if counted[place]
                and milliseconds(one.event_time) > self._since
                and crc32(one.card.encode()) < self._below
            ]
            rows.append(self._columns.seen(batch.rows[chosen]))
            for place in chosen:
                one = asked[place]
                time = milliseconds(one.event_time)
                told.append((_key(one, time), time, float(output[place, 0]), 0.0))
        return np.concatenate(rows), np.array(told, _PAYMENT)

    def _take_labels(self) -> None:
        count = len(self._noted)
        labels = [self._noted.popleft() for _ in range(count)]
        made = [(_key(one, milliseconds(one.event_time)), one.fraud) for one in labels]
        self._labels.put(np.array(made, _LABEL))

    def cost(self, seconds: float) -> None:
        """Note what the last call took on the device."""
        if self._asked:
            self._costs.append(seconds / self._asked * 1e6)
            self._asked = 0

    def figures(self, label_days: float) -> dict[str, float]:
        """What :func:`compare` says so far, the device's cost, and the days between first and last.

        Args:
            label_days: a payment this old without a label is genuine.
        """
        payments = self._payments.rows()[::-1]
        # one that came again, after a rewind say, counts once
        payments = payments[np.unique(payments["key"], return_index=True)[1]]
        if not len(payments):
            return {"payments": 0.0, "labelled": 0.0, "frauds": 0.0}
        newest = int(payments["time"].max())
        fraud = np.where(payments["time"] <= newest - label_days * DAY, 0, -1).astype(np.int8)
        labels = self._labels.rows()[::-1]  # the newest of each key counts
        keys, first = np.unique(labels["key"], return_index=True)
        if len(keys):
            at = np.minimum(np.searchsorted(keys, payments["key"]), len(keys) - 1)
            told = keys[at] == payments["key"]
            fraud[told] = labels["fraud"][first][at][told]
        pair = Pair(payments["champion"], payments["challenger"], self._thresholds)
        figures = compare(pair, fraud)
        figures["days"] = (newest - int(payments["time"].min())) / DAY
        if self._costs:
            figures["cost_us"] = float(np.quantile(list(self._costs), 0.99))
        for name, value in figures.items():
            MEASURES.labels(name).set(value)
        return figures


def _key(payment: Payment | Label, time: int) -> int:
    """64 bits of what a label names its payment by."""
    words = f"{payment.terminal_id} {time}".encode()
    return crc32(payment.transaction_id.encode()) << 32 | crc32(words)
