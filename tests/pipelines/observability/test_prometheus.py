"""Rules, alerts and the dashboard, by the real ``promtool`` and a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from serving import Running, running, until
from tiny_verticals import Tiny

from plinth.pipelines.cli.doors.metrics import promises_of
from plinth.pipelines.config.settings import Config, load
from plinth.pipelines.http.metrics import RequestMetrics
from plinth.pipelines.observability.dashboard import dashboard
from plinth.pipelines.observability.rules import Promise, of_model, of_route, rules
from plinth.pipelines.stream import metrics as stream

ROUTE = "/v1/tiny/double"


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Both programs; ``.ci/run`` installs them, elsewhere the tests are left out without."""
    if not (shutil.which("promtool") and shutil.which("prometheus")):
        if os.environ.get("PLINTH_REQUIRE_PROMETHEUS"):
            pytest.fail("not installed: prometheus")
        pytest.skip("not installed: prometheus (apt-get install prometheus)")


def promtool(*words: str, folder: Path) -> str:
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def promised() -> list[Promise]:
    seconds = (Tiny.sla.deadline_ms or 0.0) / 1e3
    return [of_route("tiny", ROUTE, seconds, 0.99), of_model("twice", seconds, 0.99)]


# -- rules ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [0.5, 0.9, 0.99, 0.9999])
def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path, objective: float) -> None:
    promises = [of_route("tiny", ROUTE, 0.0123456, objective), of_model("a-b.c", 86_399, objective)]
    (tmp_path / "rules.yml").write_text(json.dumps(rules(promises)))
    assert "SUCCESS" in promtool("check", "rules", "rules.yml", folder=tmp_path)


def series(outcome: str, kept: str, asked: str) -> list[dict[str, str]]:
    name = "plinth_http_request_seconds"
    labels = f'route="{ROUTE}",outcome="{outcome}"'
    return [
        {"series": f'{name}_bucket{{{labels},le="0.15"}}', "values": kept},
        {"series": f'{name}_bucket{{{labels},le="+Inf"}}', "values": asked},
        {"series": f"{name}_count{{{labels}}}", "values": asked},
    ]


@pytest.mark.parametrize(
    ("given", "severities"),
    [
        pytest.param(series("answered", "0+100x360", "0+100x360"), [], id="all in time"),
        pytest.param(series("answered", "0+99.5x360", "0+100x360"), [], id="half the budget"),
        pytest.param(
            series("answered", "0+94x360", "0+100x360"), ["ticket", "ticket"], id="6 per cent late"
        ),
        pytest.param(
            series("answered", "0+50x360", "0+100x360"),
            ["page", "page", "ticket", "ticket"],
            id="half of them late",
        ),
        pytest.param(
            series("refused", "0+100x360", "0+100x360"),
            ["page", "page", "ticket", "ticket"],
            id="all refused, at once",
        ),
        pytest.param(
            [*series("answered", "0+100x360", "0+100x360"), *series("wrong", "0x360", "0+900x360")],
            [],
            id="wrong by their clients",
        ),
        pytest.param(
            [
                *series("answered", "0+90x360", "0+90x360"),
                *series("failed", "0+40x360", "0+40x360"),
            ],
            ["page", "page", "ticket", "ticket"],
            id="failed, some of them fast",
        ),
        pytest.param([], [], id="nobody asks"),
    ],
)
def test_alerts_come_when_the_budget_burns(
    tmp_path: Path, given: list[dict[str, str]], severities: list[str]
) -> None:
    """Six hours, a sample a minute; the alerts that are active then, by promtool's own engine."""
    promises = [of_route("tiny", ROUTE, 0.15, 0.99)]
    (tmp_path / "rules.yml").write_text(json.dumps(rules(promises)))
    expected = [
        {"labels": f'ALERTS{{alertname="PlinthPromiseBurns",alertstate="firing",'
                   f'severity="{severity}",slo="tiny",window="{window}"}}', "value": 1}
        for severity, window in zip(severities, _windows(severities), strict=True)
    ]  # fmt: skip
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "5m",
        "tests": [
            {
                "interval": "1m",
                "input_series": given,
                "promql_expr_test": [
                    {
                        "expr": 'ALERTS{alertname="PlinthPromiseBurns",alertstate="firing"}',
                        "eval_time": "6h",
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    promtool("test", "rules", "test.yml", folder=tmp_path)


def _windows(severities: list[str]) -> list[str]:
    return {0: [], 2: ["1d", "3d"], 4: ["1h", "6h", "1d", "3d"]}[len(severities)]


def test_shares_in_time_add_up_over_replicas_at_any_promise() -> None:
    """A bucket ends at the promise itself: 150.000 ms is kept, 150.001 ms is not."""
    for promise in (0.15, 0.0123, 1.0, 7.77):
        metrics = RequestMetrics()
        metrics.promise(ROUTE, promise)
        for seconds in (promise, promise * 1.00001, promise / 2):
            metrics.note(ROUTE, 200, seconds)
        metrics.note(ROUTE, 503, 0.0)
        found = {
            (sample.labels["outcome"], float(sample.labels["le"])): sample.value
            for family in metrics.collect()
            for sample in family.samples
            if sample.name.endswith("_bucket")
        }
        assert found["answered", promise] == 2
        assert found["answered", float("inf")] == 3
        assert found["refused", promise] == 1
        assert found["failed", float("inf")] == 0


def test_rules_follow_the_promises_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "plinth.toml").write_text(
        "[verticals.finance.sla]\ndeadline_ms = 80\nquantile = 0.95\n"
    )
    found = promises_of(load(tmp_path / "plinth.toml", env={}), ["finance"])
    assert {(each.name, each.seconds, each.objective) for each in found} == {
        (name, 0.08, 0.95) for name in ("finance", "model:fraud", "model:fraud-lite")
    }
    assert 'route="/v1/finance/score",outcome="answered",le="0.08"' in found[0].kept
    (tmp_path / "rules.yml").write_text(json.dumps(rules(found, job="scores")))
    promtool("check", "rules", "rules.yml", folder=tmp_path)


def test_a_model_that_verticals_share_is_watched_by_the_promise_of_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One promises a minute and the other 2 s: neither bucket says what both have promised."""
    verticals = {"tiny": Tiny(), "slow": Tiny()}
    verticals["slow"].name = "slow"
    monkeypatch.setattr("plinth.pipelines.assembly.load_verticals", lambda config, names: verticals)
    config = Config.model_validate(
        {"verticals": {"slow": {"sla": {"deadline_ms": 2000, "quantile": 0.9}}}}
    )
    routes = [each for each in promises_of(config, []) if not each.name.startswith("model:")]
    assert [(each.name, each.seconds) for each in routes] == [("tiny", 60.0), ("slow", 2.0)]
    [shared] = [each for each in promises_of(config, []) if each.name == "model:twice"]
    assert shared.objective == Tiny.sla.quantile
    with running(verticals, verticals={"slow": {"sla": {"deadline_ms": 2000}}}) as server:

        def counted() -> tuple[float, float]:
            found = generate_latest(server.engine.metrics.registry).decode()
            values = dict(line.rsplit(" ", 1) for line in found.splitlines() if "{" in line)
            calls = {name: float(value) for name, value in values.items() if "calls_total" in name}
            kept = sum(value for name, value in calls.items() if 'outcome="answered"' in name)
            return kept, sum(calls.values())

        before = counted()
        server.post(ROUTE, json={"id": "a", "value": 1})
        server.post(ROUTE.replace("tiny", "slow"), json={"id": "a", "value": 1})
        refused = {"x-slo-deadline-ms": "0.001"}
        server.post(ROUTE, json={"id": "a", "value": 1}, headers=refused)
        assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 3]
    assert shared.kept == 'plinth_calls_total{model="twice",outcome="answered"}'


# -- a real Prometheus ----------------------------------------------------------------------------
@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Scrapes a server each second and evaluates the rules."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "plinth", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    promtool("check", "config", "prometheus.yml", folder=folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [
                "prometheus",
                *("--config.file=prometheus.yml", "--storage.tsdb.path=data"),
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=folder,
            stdout=said,
            stderr=said,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        until(lambda: _ready(client))
        yield client
    finally:
        client.close()
        process.kill()
        process.wait(60)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(server: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = server.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def traffic(server: Running) -> None:
    """Some of each outcome."""
    for number in range(10):
        assert server.post(ROUTE, json={"id": "a", "value": number}).status_code == 200
    late = {"x-slo-deadline-ms": "0.001"}
    assert server.post(ROUTE, json={"id": "a", "value": 1}, headers=late).status_code == 503
    assert server.post(ROUTE, json={"id": "a"}).status_code == 422


def of_a_stream() -> None:
    """What a stream worker of this process would count; brokers are other tests' business."""
    stream.LAG.labels("payments", "0").set(3)
    stream.RECORDS.labels("payments", "scored").inc(10)
    stream.COMMIT_SECONDS.labels("exactly_once").observe(0.01)
    stream.DEAD_SHARE.labels("payments").set(0.01)


def test_every_panel_and_rule_gets_an_answer_from_prometheus(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(json.dumps(rules(promised())))
    expressions = {
        f"{panel['title']}: {target['expr']}": target["expr"].replace("$__rate_interval", "30s")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    }
    assert len(expressions) > 15
    with running({"tiny": Tiny()}) as server:
        target = re.sub("^http://", "", server.server.url)
        of_a_stream()
        with prometheus(tmp_path, target) as client:

            def silent() -> list[str]:
                traffic(server)
                of_a_stream()
                return [name for name, expression in expressions.items() if not data(expression)]

            def data(expression: str) -> bool:
                found = ask(client, expression)
                return any(sample["value"][1] != "NaN" for sample in found)

            until(lambda: not silent())
            [missed] = ask(client, 'plinth:promise_missed:ratio_rate5m{slo="tiny"}')
            assert 0.05 < float(missed["value"][1]) < 0.2  # one of eleven was refused
            groups = client.get("/api/v1/rules").json()["data"]["groups"]
            told = [rule for group in groups for rule in group["rules"]]
            assert len(told) == len([r for g in rules(promised())["groups"] for r in g["rules"]])
            assert {rule["health"] for rule in told} <= {"ok", "unknown"}
            assert not [rule for rule in told if rule.get("lastError")]
