"""Prometheus rules of promises: how much of the error budget burns, and when to be told.

Alerts look at two windows each, a long one so that little noise alarms and a short one so that an
alarm ends soon (Google, *The Site Reliability Workbook*, chapter 5, table 5-8). What is counted
lies in buckets that end exactly at the promise, so that sums over replicas stay right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from plinth.engine.metrics import upper_bound

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
_BURNS = (  # severity, factor, long and short window, how long before it is told
    ("page", 14.4, "1h", "5m", "2m"),
    ("page", 6.0, "6h", "30m", "15m"),
    ("ticket", 3.0, "1d", "2h", "1h"),
    ("ticket", 1.0, "3d", "6h", "3h"),
)


@dataclass(frozen=True)
class Promise:
    """A promise that is kept by a share of what it covers.

    Args:
        name: of the promise in rules and alerts.
        seconds: from arrival to answer; ``None``: each caller has their own.
        objective: share that is to be in time, between 0 and 1.
        kept: selector of the counter of what was answered in time.
        asked: selector of the counter of all that the promise covers.
    """

    name: str
    seconds: float | None
    objective: float
    kept: str
    asked: str


def of_route(name: str, route: str, seconds: float, objective: float) -> Promise:
    """The promise of a record route: refused and failed requests were not kept, wrong ones do not
    count."""
    le = upper_bound(seconds)
    histogram = "plinth_http_request_seconds"
    return Promise(
        name,
        seconds,
        objective,
        f'{histogram}_bucket{{route="{route}",outcome="answered",le="{le}"}}',
        f'{histogram}_count{{route="{route}",outcome=~"answered|refused|failed"}}',
    )


def of_model(model: str, seconds: float, objective: float) -> Promise:
    """The promise of a model's calls, whichever door they came by, streams included."""
    le = upper_bound(seconds)
    return Promise(
        f"model:{model}",
        seconds,
        objective,
        f'plinth_call_seconds_bucket{{model="{model}",le="{le}"}}',
        f'plinth_calls_total{{model="{model}",outcome!="cancelled"}}',
    )


def of_shared_model(model: str, objective: float) -> Promise:
    """The promises of a model that several verticals share, each with its own: a call is kept by
    the promise it was made under. Calls without one count as kept.

    Args:
        model: its name.
        objective: the highest of their shares, so that none is missed unseen.
    """
    calls = f'plinth_calls_total{{model="{model}",outcome'
    return Promise(
        f"model:{model}", None, objective, f'{calls}="answered"}}', f'{calls}!="cancelled"}}'
    )


def missed(promise: Promise, window: str) -> str:
    """Share of what a promise covers that was not in time, over a window."""
    kept = f"(sum(rate({promise.kept}[{window}])) or vector(0))"
    return f"1 - {kept} / (sum(rate({promise.asked}[{window}])) > 0)"


def rules(promises: Iterable[Promise], job: str = "plinth") -> dict[str, Any]:
    """A file of rules for Prometheus; as JSON it is YAML, too.

    Args:
        promises: what is promised.
        job: name of the scrape job, for the alert that nobody answers.
    """
    promises = list(promises)
    recorded = [
        {
            "record": f"plinth:promise_missed:ratio_rate{window}",
            "expr": missed(promise, window),
            "labels": {"slo": promise.name},
        }
        for promise in promises
        for window in WINDOWS
    ]
    alerts = [alert for promise in promises for alert in _burns(promise)]
    return {
        "groups": [
            {"name": "plinth-promises", "rules": recorded},
            {"name": "plinth-burn-rates", "rules": alerts},
            {"name": "plinth-faults", "rules": _faults(job)},
        ]
    }


def _burns(promise: Promise) -> Iterable[dict[str, Any]]:
    budget = 1.0 - promise.objective
    within = "their promises" if promise.seconds is None else f"{promise.seconds * 1e3:g} ms"
    for severity, factor, long, short, wait in _BURNS:
        if (bound := factor * budget) >= 1.0:
            continue  # no share can be missed so fast
        series = "plinth:promise_missed:ratio_rate"
        over = " and ".join(
            f'{series}{window}{{slo="{promise.name}"}} > {bound:.6g}' for window in (long, short)
        )
        yield {
            "alert": "PlinthPromiseBurns",
            "expr": over,
            "for": wait,
            "labels": {"severity": severity, "slo": promise.name, "window": long},
            "annotations": {
                "summary": f"{promise.name}: {{{{ $value | humanizePercentage }}}} not within "
                f"{within} over {long}",
                "description": f"{promise.objective:.4%} are promised; at {factor:g} times the "
                "budget. plinth_sla_misses_total says why, plinth_queue_rows what waits.",
            },
        }


def _faults(job: str) -> list[dict[str, Any]]:
    told = (
        ("PlinthDown", f'up{{job="{job}"}} == 0', "2m", "page", "a server does not answer"),
        (
            "PlinthStreamLostRecords",
            "increase(plinth_kafka_lost_records_total[10m]) > 0",
            "0m",
            "page",
            "records were deleted by retention before they were read",
        ),
        (
            "PlinthStreamLogCut",
            "increase(plinth_kafka_cut_records_total[10m]) > 0",
            "0m",
            "page",
            "brokers have lost the end of a log that a stream had read",
        ),
        (
            "PlinthDeadLetters",
            "plinth_dead_letter_alarm == 1",
            "5m",
            "page",
            "too many records of a stream are dead letters",
        ),
        (
            "PlinthRequestLogIncomplete",
            "increase(plinth_request_log_lost_total[10m]) > 0",
            "0m",
            "ticket",
            "the disk does not keep up with the log of requests",
        ),
        (
            "PlinthSettingsWrong",
            'increase(plinth_key_file_reloads_total{outcome="wrong"}[10m]) > 0 or '
            'increase(plinth_settings_reloads_total{outcome="wrong"}[10m]) > 0',
            "0m",
            "ticket",
            "a file that changed is wrong, and what was in force before stays",
        ),
    )
    return [
        {
            "alert": name,
            "expr": expression,
            "for": wait,
            "labels": {"severity": severity},
            "annotations": {"summary": f"{{{{ $labels.instance }}}}: {what}"},
        }
        for name, expression, wait, severity, what in told
    ]
