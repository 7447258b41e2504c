"""Prometheus metrics of fraud scoring: what its memory holds, and what it had to forget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from prometheus_client import Counter, Gauge

from plinth.compiled import hot_code_is_compiled
from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance.features.online import FeatureState

log = logging.getLogger(__name__)

PARTIAL_DECISIONS = Counter(
    "plinth_finance_partial_decisions_total",
    "Decisions with features_partial: something forgotten, or kept by another worker, is missing.",
    registry=REGISTRY,
)
RULE_HITS = Counter(
    "plinth_finance_rule_hits_total",
    "Payments that a rule held for; effect: applied, or shadow for rules that only watch.",
    ("code", "effect"),
    registry=REGISTRY,
)
EVICTED = Counter(
    "plinth_finance_evicted_total",
    "Entities forgotten because max_cards (_terminals, _customers, _devices) or max_events was "
    "reached. Any increase is an alarm.",
    ("table",),
    registry=REGISTRY,
)
REMEMBERED = Gauge(
    "plinth_finance_remembered",
    "Entities remembered now.",
    ("table",),
    registry=REGISTRY,
)
ENTRIES = Gauge(
    "plinth_finance_remembered_events",
    "Events and labels remembered now, over all entities of the table.",
    ("table",),
    registry=REGISTRY,
)
COMPILED = Gauge(
    "plinth_finance_features_compiled",
    "1 where the code of the features runs compiled, 0 where it is interpreted.",
    registry=REGISTRY,
)
COMPILED.set(hot_code_is_compiled())
TABLES = ("cards", "terminals", "customers", "devices")


class TableMetrics:
    """Shows the tables of a feature state, and warns when the first of each is forgotten.

    Args:
        state: gives the state as it is when metrics are collected; ``None`` once it is gone.
    """

    def __init__(self, state: Callable[[], FeatureState | None]) -> None:
        self._evicted = dict.fromkeys(TABLES, 0)
        for table in TABLES:
            REMEMBERED.labels(table).set_function(partial(_size, state, table, False))
            ENTRIES.labels(table).set_function(partial(_size, state, table, True))

    def count_evictions(self, state: FeatureState) -> None:
        """Count what was forgotten since the last call, and warn of the first."""
        for table in TABLES:
            evicted = getattr(state, table).evicted
            before = self._evicted[table]
            if evicted == before:
                continue
            self._evicted[table] = evicted
            if not before:
                log.warning(
                    "more %s than may be remembered (max_%s, max_events): the one longest unseen "
                    "is forgotten; decisions that miss it say features_partial",
                    table, table,
                )  # fmt: skip
            EVICTED.labels(table).inc(max(0, evicted - before))


def _size(state: Callable[[], FeatureState | None], table: str, events: bool) -> float:
    found = state()
    if found is None:
        return 0.0
    entities = getattr(found, table)
    return float(entities.entries if events else len(entities.items))
