"""The desk of who looks at alerts: a tape, a queue, one case at a time, thresholds, models.

Whatever vertical offers the queries of :data:`NEEDED` has one; it asks them as any client would,
so a page shows and changes nothing that the JSON routes do not.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.registry import Collector

from plinth.engine import InputError
from plinth.pipelines.records import ask
from plinth.verticals import Query, Vertical

if TYPE_CHECKING:
    from plinth.pipelines.stream.history.follow import Follower

NEEDED = frozenset(
    {"alerts", "alerts/{alert}", "alerts/{alert}/label", "what-if", "tape", "models"}
)
"""Queries, by path, that make a desk."""
QUEUE = 50
"""Alerts of the queue on the page."""
OVER = 10
"""Looks that rate and latency are of, a second apart."""
LEVELS = 400
"""Steps of the slider of thresholds."""
_DECADES = 4


def queries(vertical: Vertical[Any, Any]) -> dict[str, Query] | None:
    """What a vertical's desk asks, by path; ``None``: it has no desk."""
    found = {query.path: query for query in vertical.queries()}
    return found if found.keys() >= NEEDED else None


def threshold(level: float) -> float:
    """The threshold at a place of the slider, 0 to :data:`LEVELS`: 0.0001 to 1, by ratios."""
    return float(10 ** (_DECADES * (level / LEVELS - 1)))


class Desk:
    """What the page of one vertical's alerts asks.

    Args:
        vertical: that has one.
        requests: the collector of ``plinth_http_request_seconds``.
        follower: reads what stream workers decided, if anything does.
    """

    def __init__(
        self,
        vertical: Vertical[Any, Any],
        requests: Collector,
        follower: Follower | None = None,
    ) -> None:
        found = queries(vertical)
        if found is None:
            raise InputError(
                f"{vertical.name} has no alerts",
                reason="not_found",
                hint=f"see /ui/verticals/{vertical.name}",
            )
        self._queries, self._requests, self._follower = found, requests, follower
        self._route = f"/v1/{vertical.name}/{vertical.action}"

    async def ask(self, path: str, **fields: Any) -> Any:
        """The answer to a query.

        Args:
            path: of the query.
            fields: as text, as a form or a query string has them.

        Raises:
            InputError: a field is wrong, or there is no such alert.
        """
        return await ask(self._queries[path], fields, as_text=True)

    async def queue(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The queue as the form above it asks for: those not yet labelled, the dearest first."""
        chosen = {
            "order": given.get("order", "expected_loss"),
            "decision": given.get("decision", ""),
            "labelled": given.get("labelled", "false"),
        }
        fields = {name: value for name, value in chosen.items() if value}
        return {"queue": await self.ask("alerts", limit=str(QUEUE), **fields), "chosen": chosen}

    async def case(self, alert: str) -> Any:
        """The case file of an alert."""
        return await self.ask("alerts/{alert}", alert=alert)

    async def what_if(self, given: Mapping[str, str]) -> dict[str, Any]:
        """What another threshold gives; without a word, the one in force."""
        models = await self.ask("models")
        days, level = given.get("label_days", "7"), given.get("level")
        wanted = models.review_threshold if level is None else threshold(_number(level))
        found = await self.ask("what-if", review_threshold=f"{wanted:.6g}", label_days=days)
        at = level or f"{LEVELS * (1 + math.log10(max(wanted, 10**-_DECADES)) / _DECADES):.0f}"
        return {"what_if": found, "label_days": days, "models": models, "level": at}

    async def tape(self) -> AsyncIterator[dict[str, Any]]:
        """The last payments, their rate and how long they took: again each second, for ever."""
        looks: deque[_Look] = deque(maxlen=OVER + 1)
        while True:
            told = await self.ask("tape")
            decided = told.approved + told.reviewed + told.declined
            looks.append(_Look(time.monotonic(), decided, self._buckets()))
            heard = None if self._follower is None else self._follower.told
            yield {"tape": told, "pace": _pace(looks), "heard": heard}
            await asyncio.sleep(1.0)

    def _buckets(self) -> dict[float, float]:
        """Answered requests of the route by upper bound in seconds, as Prometheus has them."""
        return {
            float(one.labels["le"]): one.value
            for family in self._requests.collect()
            for one in family.samples
            if one.name == "plinth_http_request_seconds_bucket"
            and one.labels["route"] == self._route
            and one.labels["outcome"] == "answered"
        }


class _Look:
    """One look at what was decided.

    Args:
        at: seconds; decided: payments so far; buckets: requests so far, by upper bound.
    """

    def __init__(self, at: float, decided: int, buckets: dict[float, float]) -> None:
        self.at, self.decided, self.buckets = at, decided, buckets


def _pace(looks: deque[_Look]) -> dict[str, float | None]:
    """Payments a second, and bounds of half and of 99 % of the requests' times in ms."""
    first, last = looks[0], looks[-1]
    seconds = last.at - first.at
    return {
        "rate": (last.decided - first.decided) / seconds if seconds else None,
        "p50": _bound(first, last, 0.5),
        "p99": _bound(first, last, 0.99),
    }


def _bound(first: _Look, last: _Look, share: float) -> float | None:
    """The bucket's end, in ms, below which this share of the requests between two looks lies."""
    counts = {end: n - first.buckets.get(end, 0.0) for end, n in sorted(last.buckets.items())}
    whole = counts.get(float("inf"), 0.0)
    for end, count in counts.items():
        if whole and count >= share * whole:
            return end * 1e3
    return None


def _number(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not 0 <= found <= LEVELS:
        raise InputError(f"level: expected 0 to {LEVELS}", field="level", reason="invalid")
    return found
