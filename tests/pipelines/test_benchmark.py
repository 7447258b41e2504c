"""``plinth benchmark``: a server over HTTP, a vertical or model in process, what it tells."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from moody_server import running
from tiny_verticals import install
from typer.testing import CliRunner

from plinth.engine import ConfigError, ModelSpec, ModelStore, PlinthError, TensorSpec, architecture
from plinth.pipelines.bench.over_http import connections_for
from plinth.pipelines.cli.benchmark import EPILOG, benchmark

clock = pytest.mark.clock  # the others hold beside whatever else runs
QUICK = ("--quantile", "0.9", "--seconds", "0.2")
Plinth = Callable[..., Any]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def plinth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plinth:
    """``plinth benchmark`` with the tiny verticals installed; its stdout, as data if it is JSON."""
    install(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in os.environ if name.startswith("PLINTH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PLINTH_ENGINE__BACKEND", "eager")  # nothing is compiled or compared
    monkeypatch.setenv("PLINTH_ENGINE__PRECISION", "fp32")
    app = typer.Typer(rich_markup_mode="rich")
    app.command(epilog=EPILOG)(benchmark)

    def call(*arguments: str, code: int = 0) -> Any:
        found = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        if isinstance(found.exception, PlinthError):
            raise found.exception
        assert found.exit_code == code, found.output
        return json.loads(found.stdout) if "--json" in arguments else found.stdout

    return call


def test_help_teaches(plinth: Plinth) -> None:
    said = " ".join(plinth("--help").split())
    for words in (
        "Example: plinth benchmark finance", "model:NAME[@VERSION]", "no MLPerf scores",
        "from when its request was due", "Exit codes: 0",
    ):  # fmt: skip
        assert words in said


@clock
def test_one_rate_of_a_server(plinth: Plinth, base: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[1, 2, 3, 4]\n\n[5, 6, 7, 8]\n")
    found = plinth(
        f"{base}/double", "--rate", "200", "--sla-ms", "500", *QUICK, "--warm-up", "0.1",
        "--body", "rows.jsonl", "--header", "X-Key: secret", "--json",
    )  # fmt: skip
    assert found["held"]
    assert found["goal"] == {"sla": 0.5, "quantile": 0.9, "confidence": 0.95}
    (step,) = found["steps"]
    (trial, *_) = step["trials"]
    assert trial["ok"] == trial["offered"] == trial["statuses"]["200"]
    assert step["share_in_time"] >= 0.9
    assert trial["client"]["cpu_us_per_request"] > 0
    assert found["environment"]["machine"]["cores"] >= 1
    assert found["environment"]["software"]["torch"]
    assert found["settings"]["headers"] == ["X-Key"]
    assert "secret" not in json.dumps(found)


@clock
def test_the_body_comes_from_the_servers_docs(plinth: Plinth, base: str) -> None:
    arguments = ("--rate", "100", "--sla-ms", "500", *QUICK, "--warm-up", "0", "--json")
    found = plinth(f"{base}/double", *arguments)
    assert found["steps"][0]["trials"][0]["failures"] == {}
    with pytest.raises(ConfigError, match="no example of a request to /plain") as told:
        plinth(f"{base}/plain", *arguments)
    assert "--body FILE" in (told.value.hint or "")


@clock
def test_the_search_with_its_table_and_picture(plinth: Plinth, base: str, tmp_path: Path) -> None:
    said = plinth(
        f"{base}/plain", "--method", "GET", "--sla-ms", "500", *QUICK, "--warm-up", "0",
        "--start-rate", "200", "--max-rate", "800", "--plot", str(tmp_path / "rates.png"),
    )  # fmt: skip
    rows = [line.split("│") for line in said.splitlines() if "held" in line]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        ("200.0", ""), ("400.0", ""), ("800.0", ""), ("800.0", "confirm"),
    ]  # fmt: skip
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_promise_that_does_not_hold_is_exit_code_1(plinth: Plinth, base: str) -> None:
    arguments = ("--rate", "200", "--sla-ms", "0.01", *QUICK, "--warm-up", "0", "--json")
    found = plinth(f"{base}/plain", "--method", "GET", *arguments, code=1)
    assert not found["held"]
    assert found["steps"][0]["share_in_time"] < 0.9


def test_a_server_that_only_errs_is_told_at_once(plinth: Plinth, base: str) -> None:
    arguments = ("--method", "GET", "--sla-ms", "100")
    with pytest.raises(PlinthError, match="HTTP 404 to a lone request: no such mood") as told:
        plinth(f"{base}/nothing", *arguments)
    assert not isinstance(told.value, ConfigError)
    with pytest.raises(PlinthError, match="does not speak HTTP"):
        plinth(f"{base}/noise", *arguments)


@clock
def test_scenarios_of_a_vertical(plinth: Plinth, tmp_path: Path) -> None:
    (tmp_path / "numbers.jsonl").write_text('{"id": "a", "value": 1}\n{"id": "b", "value": 2}\n')
    found = plinth(
        "tiny", "--seconds", "0.2", "--rate", "100", "--sla-ms", "500", "--quantile", "0.9",
        "--body", "numbers.jsonl", "--logs", "logs", "--json",
    )  # fmt: skip
    scenarios = {one["scenario"]: one for one in found["scenarios"]}
    assert set(scenarios) == {"SingleStream", "Offline", "Server"}
    assert all(one["valid"] and one["answered"] == one["samples"] for one in scenarios.values())
    assert found["held"]
    assert (tmp_path / "logs/server/mlperf_log_summary.txt").is_file()


@clock
def test_the_search_asks_loadgen_too(plinth: Plinth) -> None:
    arguments = ("--scenario", "server", *QUICK, "--start-rate", "200", "--max-rate", "400")
    found = plinth("tiny", *arguments, "--json")
    answer = found["search"]
    assert (answer["rate"], answer["ceiling"], answer["limit"]) == (400.0, None, "max_rate")
    assert [step["rate"] for step in answer["steps"]] == [200, 400, 400]
    assert answer["steps"][-1]["purpose"] == "confirm"
    assert answer["steps"][0]["trials"][0]["loadgen"]
    assert found["scenarios"] == []


@clock
def test_a_vertical_of_folders_without_a_deadline(plinth: Plinth, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.txt").write_text("1")
    (tmp_path / "in/two.txt").write_text("2")
    said = plinth("shelf", "--seconds", "0.2", "--body", "in")
    assert "no MLPerf scores" in said
    assert "SingleStream" in said
    assert "Server" not in said, "it promises nothing"
    with pytest.raises(ConfigError, match="shelf promises no deadline"):
        plinth("shelf", "--scenario", "server")


@clock
def test_a_model_of_the_store(
    plinth: Plinth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    architecture("benchmark-linear")(torch.nn.Linear)
    spec = ModelSpec(
        name="line", version="2", architecture="benchmark-linear",
        config={"in_features": 4, "out_features": 1},
        inputs=(TensorSpec(name="x", shape=(4,)),), outputs=(TensorSpec(name="y", shape=(1,)),),
    )  # fmt: skip
    ModelStore(tmp_path / "store").save(spec, torch.nn.Linear(4, 1))
    monkeypatch.setenv("PLINTH_MODEL_STORE", str(tmp_path / "store"))
    found = plinth("model:line@2", "--scenario", "single_stream", "--seconds", "0.2", "--json")
    assert found["scenarios"][0]["valid"]
    with pytest.raises(PlinthError, match="line"):
        plinth("model:line@3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("http://127.0.0.1:1/x",), "a URL brings no promise"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9"), "no /openapi.json"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9", "--body", "one.json"), "cannot reach"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9", "--scenario", "server"), "LoadGen's"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9", "--header", "key"), "'Name: value'"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9", "--body", "absent"), "cannot read absent"),
        (("http://127.0.0.1:1/x", "--sla-ms", "9", "--body", "empty"), "empty is empty"),
        (("tinny",), "did you mean 'tiny'"),
        (("tiny", "--scenario", "servr"), "did you mean 'server'"),
        (("tiny", "--body", "one.json"), "--body: "),
        (("model:x", "--body", "one.json"), "asked with noise"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    plinth: Plinth, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "one.json").write_text('{"what": 1}')
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError) as told:
        plinth(*arguments)
    assert said in str(told.value)


def test_connections_suffice_by_littles_law() -> None:
    assert connections_for(1000.0, 0.05) == 100
    assert connections_for(1.0, 0.01) == 16
    assert connections_for(1e6, 1.0) == 768
