"""Somebody else's vertical, pip-installed into a fresh environment, opens every door."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("plinth.pipelines.cli.main", reason="the doors are not installed")
ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "example_vertical"
sys.path.insert(0, str(ROOT / "tests" / "pipelines"))

from kafka_fixtures import KafkaNode, kafka_node  # noqa: E402 - after the path is set
from serving import served  # noqa: E402

__all__ = ["kafka_node"]

KNOCKING = [8.0 if at % 64 == 0 else 0.1 * (-1) ** at for at in range(256)]
HUMMING = [(-1.0) ** at for at in range(256)]

USE = """
from plinth.engine import Engine
from plinth.verticals import registry
from plinth.verticals.testing import check_vertical

vertical = registry.load("sensors", {"alarm_above": 0.4})
check_vertical(vertical).raise_if_failed()
with Engine() as engine:
    for model in vertical.models():
        engine.add(model, sla=vertical.sla)
    answer = engine.run(vertical.infer([vertical.example()] * 3))
assert [health.alarm for health in answer.value] == [True] * 3
assert answer.models == {"impulses": "1.0.0"}
"""


ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys

from plinth.pipelines.cli.main import main

found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            main(words)
        except SystemExit as ended:
            found.append([ended.code or 0, *(one.getvalue() for one in said)])
print(json.dumps(found))
"""
"""Runs command lines in one process, which imports torch once."""


class Environment:
    """A virtual environment that sees the packages of this one, and what pip puts on top."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        ours = [path for path in site.getsitepackages() if Path(path).is_dir()]
        lines = [f"import site; site.addsitedir({path!r})" for path in ours]
        (packages / "parent.pth").write_text("\n".join([*lines, str(ROOT)]) + "\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PLINTH", "PYTHON"))}
        self.env |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), "PLINTH_ENGINE__BACKEND": "eager"}

    def install(self, source: Path) -> None:
        """pip install without a network."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*command, "--no-build-isolation", source], check=True, env=self.env)

    def command(self, *words: str | Path) -> list[str]:
        """The words of a ``plinth`` command."""
        return [str(self.python), "-m", "plinth", *map(str, words)]

    def python_says(self, program: str, *words: str) -> str:
        """Run a program to its end; returns what it printed."""
        done = subprocess.run(
            [self.python, "-c", program, *words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def plinth(self, *words: str | Path) -> Any:
        """Run a command to its end; returns the JSON it printed."""
        done = subprocess.run(
            self.command(*words, "--json"),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the example in it, installed from a copy so that none is left behind."""
    folder = tmp_path_factory.mktemp("plugged")
    source = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("*.egg-info"))
    environment = Environment(folder / "venv")
    environment.install(source)
    return environment


@pytest.fixture(scope="module")
def url(plugged: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a real server process on a free port; it must drain on SIGTERM."""
    words = plugged.command("serve", "sensors", "--port", "0", "--device", "cpu")
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with served(words, log, env=plugged.env) as server:
        yield server.url
        server.drain()


def window(samples: list[float], sensor: str = "pump-7") -> bytes:
    return json.dumps({"sensor": sensor, "samples": samples}).encode()


def test_it_keeps_the_contract_and_is_listed_and_checked_with_its_config_table(
    plugged: Environment, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right.toml", tmp_path / "wrong.toml"
    right.write_text("[verticals.sensors]\nalarm_above = 0.9\n")
    wrong.write_text("[verticals.sensors]\nalarm_abvoe = 0.9\n")
    commands = [
        ["list", "--json"],
        ["check", "sensors", "--config", str(right), "--json"],
        ["check", "sensors", "--config", str(wrong)],
    ]
    told = json.loads(plugged.python_says(USE + ONE_AFTER_ANOTHER, json.dumps(commands)))
    assert [code for code, _, _ in told] == [0, 0, 2], told
    (found,) = [each for each in json.loads(told[0][1]) if each["name"] == "sensors"]
    assert (found["distribution"], found["version"]) == ("plinth-sensors", "1.0.0")
    assert found["doors"] == ["http", "kafka", "folder"]
    assert found["error"] is None
    plan = json.loads(told[1][1])
    assert plan["verticals"]["sensors"]["models"] == {"impulses": "1.0.0"}
    assert "wrong.toml:2" in told[2][2]
    assert "alarm_above" in told[2][2]


@pytest.mark.slow
def test_http_answers_it(url: str) -> None:
    route = f"{url}/v1/sensors/score"
    headers = {"content-type": "application/json", "x-slo-deadline-ms": "60000"}
    bad = httpx.post(route, content=window(KNOCKING), headers=headers, timeout=30)
    good = httpx.post(route, content=window(HUMMING), headers=headers, timeout=30)
    assert bad.is_success, bad.text
    assert (bad.json()["alarm"], good.json()["alarm"]) == (True, False)

    both = b"[" + window(KNOCKING) + b"," + window([1.0], "pump-8") + b"]"
    first, second = httpx.post(route, content=both, headers=headers, timeout=30).json()["results"]
    assert first["result"] == bad.json()
    assert second["error"]["field"] == "samples"

    api = httpx.get(f"{url}/openapi.json", timeout=30).json()
    assert "/v1/sensors/score" in api["paths"]
    assert "/v1/sensors/score" in httpx.get(f"{url}/metrics", timeout=30).text


@pytest.mark.slow
def test_a_folder_of_csv_files_becomes_reports(plugged: Environment, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for name, samples in (("pump-7", KNOCKING), ("fan-1", HUMMING), ("cut-off", HUMMING[:9])):
        (recordings / f"{name}.csv").write_text("\n".join(map(str, samples)))
    words = ("batch", "sensors", recordings, "--out", tmp_path / "out", "--json")
    done = subprocess.run(
        plugged.command(*words),
        env=plugged.env,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1, "one of three files is cut off"
    assert json.loads(done.stdout)["states"] == {
        "cut-off": "failed",
        "fan-1": "done",
        "pump-7": "done",
    }
    reports = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("out/*/report.json")}
    assert {name: report["alarm"] for name, report in reports.items()} == {
        "pump-7": True,
        "fan-1": False,
    }


@pytest.mark.slow
@pytest.mark.kafka
def test_a_topic_is_scored(plugged: Environment, kafka_node: KafkaNode) -> None:
    stream = kafka_node.config()
    records = [(None, window(KNOCKING)), (None, b"{"), (None, window(HUMMING, "fan-1"))]
    kafka_node.fill(stream, records)
    summary = plugged.plinth(
        *("stream", "sensors", "--bootstrap-servers", kafka_node.servers),
        *("--input-topic", stream.input_topic, "--output-topic", stream.output_topic),
        *("--max-events", "3"),
    )
    assert summary["records"] == 3
    answers = kafka_node.read(stream.output_topic)
    health = {record.key.decode(): json.loads(record.value) for record in answers}
    assert {sensor: said["alarm"] for sensor, said in health.items()} == {
        "pump-7": True,
        "fan-1": False,
    }
    (dead,) = kafka_node.read(stream.dead_letters)
    assert dead.value == b"{"
