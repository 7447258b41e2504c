"""A Grafana dashboard: promises, doors, engine, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_RATE = "[$__rate_interval]"
_HTTP = "plinth_http_request_seconds"
_CALLS = "plinth_call_seconds"
Panel = tuple[str, str, str, str]


def _quantile(share: float, family: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({family}_bucket{_RATE})))"


_ROWS: dict[str, tuple[Panel, ...]] = {  # title, unit, expression, legend
    "Promises": (
        ("Missed, 5 minutes", "percentunit", "plinth:promise_missed:ratio_rate5m", "{{slo}}"),
        ("Missed, 1 hour", "percentunit", "plinth:promise_missed:ratio_rate1h", "{{slo}}"),
        (
            "Misses by cause",
            "short",
            f"sum by (model, cause) (rate(plinth_sla_misses_total{_RATE}))",
            "{{model}} {{cause}}",
        ),
    ),
    "HTTP": (
        (
            "Requests",
            "reqps",
            f"sum by (route, outcome) (rate({_HTTP}_count{_RATE}))",
            "{{route}} {{outcome}}",
        ),
        ("Median", "s", _quantile(0.5, _HTTP, "route"), "{{route}}"),
        ("99th percentile", "s", _quantile(0.99, _HTTP, "route"), "{{route}}"),
        (
            "Statuses",
            "reqps",
            f"sum by (status) (rate(plinth_http_requests_total{_RATE}))",
            "{{status}}",
        ),
    ),
    "Engine": (
        (
            "Device busy",
            "percentunit",
            f"rate(plinth_device_busy_seconds_total{_RATE})",
            "{{device}}",
        ),
        ("Rows that wait", "short", "sum by (kind) (plinth_queue_rows)", "{{kind}}"),
        (
            "Calls",
            "reqps",
            f"sum by (model, outcome) (rate(plinth_calls_total{_RATE}))",
            "{{model}} {{outcome}}",
        ),
        ("Calls, 99th percentile", "s", _quantile(0.99, _CALLS, "model"), "{{model}}"),
        (
            "Queue, 99th percentile",
            "s",
            _quantile(0.99, "plinth_queue_seconds", "model"),
            "{{model}}",
        ),
        (
            "Rows of a batch",
            "short",
            f"sum by (model) (rate(plinth_batch_rows_sum{_RATE})) / "
            f"sum by (model) (rate(plinth_batch_rows_count{_RATE}))",
            "{{model}}",
        ),
        (
            "Batch, 99th percentile",
            "s",
            _quantile(0.99, "plinth_batch_seconds", "model"),
            "{{model}}",
        ),
        ("Memory of the device", "bytes", "plinth_device_bytes", "{{device}} {{kind}}"),
        ("Memory of the process", "bytes", "process_resident_memory_bytes", "{{instance}}"),
        ("CPU of the process", "short", f"rate(process_cpu_seconds_total{_RATE})", "{{instance}}"),
    ),
    "Streams": (
        ("Lag", "short", "sum by (topic) (plinth_kafka_lag_records)", "{{topic}}"),
        (
            "Records",
            "short",
            f"sum by (topic, outcome) (rate(plinth_kafka_records_total{_RATE}))",
            "{{topic}} {{outcome}}",
        ),
        (
            "Commits, 99th percentile",
            "s",
            _quantile(0.99, "plinth_kafka_commit_seconds", "guarantee"),
            "{{guarantee}}",
        ),
        ("Share of dead letters", "percentunit", "plinth_dead_letter_share", "{{topic}}"),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it (schema 39); it asks for the data source."""
    return {
        "__inputs": [
            {"name": "DS", "label": "Prometheus", "type": "datasource", "pluginId": "prometheus"}
        ],
        "title": "Plinth",
        "uid": "plinth",
        "schemaVersion": 39,
        "tags": ["plinth"],
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    source = {"type": "prometheus", "uid": "${DS}"}
    for row, panels in _ROWS.items():
        number += 1
        at = {"x": 0, "y": y, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": row, "gridPos": at, "panels": []}
        y += 1
        for place, (title, unit, expression, legend) in enumerate(panels):
            number += 1
            if place and place % 3 == 0:
                y += 8
            yield {
                "id": number,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"x": 8 * (place % 3), "y": y, "w": 8, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {
                        "refId": "A",
                        "datasource": source,
                        "expr": expression,
                        "legendFormat": legend,
                    }
                ],
            }
        y += 8
