"""The command: help that teaches, errors as one clear text, exit codes, JSON for scripts."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_verticals import GATE, Gate, install

from plinth.engine import ConfigError
from plinth.pipelines.cli.doctor import _devices, _packages
from plinth.pipelines.cli.main import main
from plinth.pipelines.config.settings import Config

COMMANDS = (
    *("list", "init", "check", "serve", "serve-model", "stream", "batch", "benchmark", "models"),
    *("convert", "demo", "doctor", "new-vertical"),
)

PLAIN = {"PLINTH_ENGINE__BACKEND": "eager", "PLINTH_ENGINE__PRECISION": "fp32"}


class Plinth:
    """``plinth`` with the two small verticals installed: called here, or in a child process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.env = install(folder / "site") | PLAIN
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Run it to the end; stdout and stderr."""
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = self._capsys.readouterr()
        assert ended.value.code == code, (out, err)
        return out, err

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start it as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "plinth", *arguments],
            env=self.env | env, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture
def plinth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plinth:
    command = Plinth(tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in os.environ if name.startswith("PLINTH_")]:
        monkeypatch.delenv(name)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    return command


def test_help_teaches_and_is_quick(plinth: Plinth) -> None:
    out, _ = plinth("--help")
    assert all(command in out for command in COMMANDS)
    assert "Exit codes" in out
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, plinth.pipelines.cli.main; print(*sys.modules)"],
        env=plinth.env, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not {"torch", "numpy", "fastapi", "pydantic", "kafka"} & set(loaded)


def test_help_of_every_command_has_an_example(plinth: Plinth) -> None:
    for command in COMMANDS:
        out, _ = plinth(command, "--help")
        if command != "models":
            assert f"Example: plinth {command}" in " ".join(out.split())


def test_doctor_says_what_is_wrong_with_the_machine_and_what_to_do(plinth: Plinth) -> None:
    def looked(code: int = 0) -> dict[str, dict[str, str]]:
        return {one["what"]: one for one in json.loads(plinth("doctor", "--json", code=code)[0])}

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        Path("plinth.toml").write_text(
            f"[serve]\nport = {port}\nmax_connections = 100000000\n[models]\nstore = 'store'\n"
        )
        found = looked()
    assert {"Python", "extra medical", "device cpu", "engine.device"} <= found.keys()
    assert found["models.store"]["state"] == "fine"
    assert found["serve.port"]["state"] == found["open files"]["state"] == "warning"
    assert found["open files"]["advice"] == ("ulimit -n 100000064, or lower serve.max_connections")
    Path("file").write_text("")
    Path("plinth.toml").write_text(
        "[engine]\ndevice = 'tpu:9'\n[models]\nstore = 'file/store'\n[serve]\n"
        "host = '203.0.113.9'\napi_key_env = 'NO_SUCH_KEY'\n"
    )
    found = looked(code=1)
    wrong = {what for what, one in found.items() if one["state"] == "wrong"}
    assert wrong == {"engine.device", "models.store", "serve.port", "API key"}
    assert all(found[what]["advice"] for what in wrong)
    Path("plinth.toml").write_text("[serve]\nprot = 1\n")
    assert "unknown key serve.prot" in looked(code=1)["config"]["found"]
    assert "something is wrong" in plinth("doctor", code=1)[1]


def test_doctor_calls_wrong_what_is_asked_for_and_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plinth.distribution.missing", lambda extra: ["nowhere"])
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    oidc = {"issuer": "https://login.example", "audience": "plinth"}
    stream = {"input_topic": "a", "output_topic": "b"}
    serve = {"web": True, "grpc": {"port": 0}, "oidc": oidc}
    asked = Config.model_validate({"serve": serve, "stream": stream})
    found = {one.what: one for one in _packages(asked)}
    wrong = {what for what, one in found.items() if one.state == "wrong"}
    assert wrong == {f"extra {name}" for name in ("web", "grpc", "oidc", "otel", "kafka")}
    assert "plinth-engine[web]" in found["extra web"].advice
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    assert {one.state for one in _packages(Config())} == {"warning"}


def test_doctor_names_each_lane_that_is_asked_for_and_what_is_wrong_with_it() -> None:
    lanes = ["cpu", "process:cpu", "gang:cpu:pipeline=2,tensor=2", "gang:cpu:tensr=2", "process:x"]
    found = [
        one
        for one in _devices(Config.model_validate({"engine": {"devices": lanes}}))
        if one.what == "engine.devices"
    ]
    assert [one.state for one in found] == ["fine"] * 3 + ["wrong"] * 2
    told = "gang:cpu:pipeline=2,tensor=2: 4 processes on cpu, replicas=1 x pipeline=2 x tensor=2"
    assert [one.found for one in found[:3]] == ["cpu: cpu", "process:cpu: cpu", told]
    assert "tensr is no factor" in found[3].found
    assert all(one.advice for one in found[3:])


def test_list_and_check_for_scripts_and_people(plinth: Plinth) -> None:
    found = {one["name"]: one for one in json.loads(plinth("list", "--json")[0])}
    assert found["tiny"]["doors"] == ["http", "kafka"]
    assert found["shelf"]["doors"] == ["folder", "http"]
    assert "Doubles numbers." in plinth("list")[0]
    (plinth.folder / "plinth.toml").write_text(
        "[verticals.tiny]\noffset = 1\n[verticals.tiny.sla]\ndeadline_ms = 25\n"
    )
    plan = json.loads(plinth("check", "--json")[0])
    assert plan["config"] == "plinth.toml"
    assert list(plan["verticals"]) == ["tiny"]
    assert plan["verticals"]["tiny"]["models"] == {"twice": "3"}
    assert plan["verticals"]["tiny"]["sla"]["deadline_ms"] == 25
    out, err = plinth("check")
    assert "twice" in out
    assert plan["models"]["twice"]["backend"] == "eager"
    assert "all is well" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve]\nprot = 1", "plinth.toml:2: unknown key serve.prot; did you mean 'port'?"),
        ("[verticals.tiny]\nofset = 1", "plinth.toml:2: unknown key verticals.tiny.ofset"),
        (
            "[verticals.tinny]\nx = 1",
            "plinth.toml:1: no vertical named 'tinny', did you mean 'tiny'",
        ),
        ("[serve]\napi_key_env = 'NO_SUCH_KEY'", "NO_SUCH_KEY, which is not set"),
    ],
)
def test_a_wrong_config_exits_with_2_and_says_why(plinth: Plinth, text: str, said: str) -> None:
    (plinth.folder / "plinth.toml").write_text(text)
    out, err = plinth("check", code=2)
    assert said in err
    assert out == ""


def test_wrong_arguments_exit_with_2(plinth: Plinth) -> None:
    plinth("serv", code=2)
    plinth("serve", "--port", "many", code=2)
    plinth("serve", "--config", "absent.toml", code=2)
    assert "no output folder" in plinth("batch", ".", code=2)[1]
    assert "no topics" in plinth("stream", "tiny", code=2)[1]
    assert "nosuch" in plinth("serve", "nosuch", "--port", "0", code=2)[1]


@pytest.mark.parametrize(
    "words",
    [
        ["check", "finance"],
        ["serve", "finance", "--port", "0"],
        ["stream", "finance", "--input-topic", "a", "--output-topic", "b"],
        ["batch", "shelf", ".", "--out", "out"],
        ["benchmark", "finance"],
        ["models", "list"],
    ],
    ids=lambda words: words[0],
)
def test_a_misspelt_vertical_in_the_file_stops_commands_that_run_others(
    plinth: Plinth, words: list[str]
) -> None:
    (plinth.folder / "plinth.toml").write_text("[verticals.fiance]\n")
    _, err = plinth(*words, code=2)
    assert "plinth.toml:1: no vertical named 'fiance', did you mean 'finance'?" in err


def test_batch_takes_a_vertical_and_a_folder(plinth: Plinth) -> None:
    (plinth.folder / "in").mkdir()
    assert "takes a vertical and a folder" in plinth("batch", "a", "b", "c", code=2)[1]
    assert "shelf is a vertical; the folder is missing" in plinth("batch", "shelf", code=2)[1]
    assert "which vertical?" in plinth("batch", "in", "--out", "out", code=2)[1]
    (plinth.folder / "plinth.toml").write_text(
        "[batch]\nvertical = 'shelf'\ninput = 'in'\noutput = 'out'\n"
    )
    (plinth.folder / "in" / "a.txt").write_text("1")
    assert json.loads(plinth("batch", "--json")[0])["states"] == {"a": "done"}
    assert json.loads(plinth("batch", "in", "--json")[0])["states"] == {"a": "skipped"}


def test_debug_shows_the_traceback(plinth: Plinth) -> None:
    assert "Traceback" in plinth("--debug", "serve", "--config", "absent.toml", code=2)[1]
    assert "Traceback" not in plinth("serve", "--config", "absent.toml", code=2)[1]


def test_a_port_in_use_exits_with_2(plinth: Plinth) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        process = plinth.start("serve", "tiny", "--port", port)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in err
    assert "--port" in err


def test_sigterm_drains_and_exits_with_0_and_an_open_door_must_be_asked_for(plinth: Plinth) -> None:
    gate = Gate(plinth.folder)
    env = {GATE: str(plinth.folder), "PLINTH_SERVE__ANNOUNCE_SECONDS": "0.3"}
    address = ("serve", "tiny", "--host", "0.0.0.0", "--port", "0")  # noqa: S104
    assert "no key is asked for" in plinth(*address, code=2)[1]
    process = plinth.start(*address, "--insecure", **env)
    url, _ = _await_url(process)
    url = url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=url, timeout=30) as client:
        held = pool.submit(client.post, "/v1/tiny/double", json={"id": "a", "value": 1000})
        gate.await_arrival()
        process.send_signal(signal.SIGTERM)
        gate.open()
        assert held.result().json() == {"id": "a", "twice": 2000.0}
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "drained" in err
    assert "Traceback" not in err


def test_sigterm_as_soon_as_the_server_says_that_it_serves_drains_it(plinth: Plinth) -> None:
    process = plinth.start("serve", "tiny", "--port", "0")
    _await_url(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "drained" in err


def _await_url(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """The URL the server tells of, and the lines before."""
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        if line.startswith("serving "):
            return line.split(" on ")[1].split(" ")[0], said
        said.append(line)
    raise AssertionError(said)


def test_a_model_is_converted_listed_and_shown(plinth: Plinth) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "net.safetensors")
    Path("net.py").write_text("from torch.nn import Linear\ndef build(n):\n return Linear(n, 2)\n")
    np.save("rows.npy", np.ones((2, 3), dtype=np.float32))
    words = ["convert", "net.safetensors", "--out", "store", "--name", "net"]
    code = ["--code", "net.py:build", "--arguments", '{"n": 3}', "--example", "rows.npy"]
    found = json.loads(plinth(*words, *code, "--json")[0])
    assert found["report"]["largest_difference"] == 0
    assert json.loads(plinth("models", "list", "--store", "store", "--json")[0]) == [found["spec"]]
    shown = json.loads(plinth("models", "show", "net", "--store", "store", "--json")[0])
    assert shown["converted"] == found["report"]
    assert "Held against its source" in plinth(*words, *code, "--version", "2")[0]
    err = plinth(*words, code=1)[1]
    assert "without the code" in err
    assert "--code" in err
    for bad in (["--free", "x"], ["--rows-dim", "x=y"], ["--arguments", "["], ["--arguments", "1"]):
        assert bad[0] in plinth(*words, *bad, code=2)[1]


def test_model_families_are_listed_with_their_settings(plinth: Plinth) -> None:
    found = {f["name"]: f for f in json.loads(plinth("models", "families", "--json")[0])}
    assert len(found) >= 12
    assert found["bert"]["settings"]["width"] == 768
    shown = plinth("models", "families")[0]
    assert "prefill only" in shown


def test_models_are_listed_shown_and_verified(plinth: Plinth) -> None:
    torch = pytest.importorskip("torch")
    from plinth.engine import ModelSpec, ModelStore, TensorSpec

    store = ModelStore(plinth.folder / "store")
    spec = ModelSpec(
        name="line",
        version="1.2",
        architecture="linear",
        inputs=(TensorSpec(name="x", shape=(2,)),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
        licence="Apache-2.0",
    )
    folder = store.save(spec, torch.nn.Linear(2, 1))
    listed = json.loads(plinth("models", "list", "--store", "store", "--json")[0])
    assert [(one["name"], one["version"]) for one in listed] == [("line", "1.2")]
    shown = plinth("models", "show", "line", "--store", "store", "--json")[0]
    assert json.loads(shown)["licence"] == "Apache-2.0"
    assert "ok" in plinth("models", "verify", "--store", "store")[0]
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    out, err = plinth("models", "verify", "--store", "store", "--json", code=1)
    assert json.loads(out)[0]["ok"] is False
    assert "damaged or missing: line" in err
    _, err = plinth("models", "show", "absent", "--store", "store", code=1)
    assert "absent" in err


def test_batch_prints_its_summary_as_json(plinth: Plinth) -> None:
    folder: Any = plinth.folder / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    arguments = ("batch", "shelf", "in", "--out", "out", "--json")
    summary = json.loads(plinth(*arguments)[0])
    assert summary["done"] == 1
    (folder / "b.txt").write_text("x")
    summary = json.loads(plinth(*arguments, code=1)[0])
    assert summary["states"] == {"a": "skipped", "b": "failed"}
    assert summary["failures"][0]["reason"] == "invalid_input"


def test_a_stream_can_serve_its_metrics() -> None:
    from plinth.pipelines.process import metrics_at

    with metrics_at("127.0.0.1:0") as url:
        assert url is not None
        assert "plinth_settings_reloads_total" in httpx.get(url).text
        address = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(ConfigError, match="Address already in use"), metrics_at(address):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    for wrong in ("9100", "host:", "host:many"):
        with pytest.raises(ConfigError, match="is not host:port"), metrics_at(wrong):
            pass


def test_keys_are_made_listed_and_revoked(plinth: Plinth) -> None:
    file = ("--file", str(plinth.folder / "keys.toml"))
    reach = ("--only", "tiny", "--only", "twice")
    made = ("--role", "read", *reach, "--per-second", "5", "--days", "1")
    key, said = plinth("keys", "add", "alice", *made, *file)
    assert key.startswith("plinth_")
    assert key.strip() not in said
    assert key.strip() not in (plinth.folder / "keys.toml").read_text()
    assert "has a key of that name" in plinth("keys", "add", "alice", *file, code=2)[1]
    assert "a name has" in plinth("keys", "add", "a b", *file, code=2)[1]
    assert "role" in plinth("keys", "add", "bob", "--role", "boss", *file, code=2)[1]
    listed = json.loads(plinth("keys", "list", "--json", *file)[0])
    assert listed["alice"]["only"] == ["tiny", "twice"]
    times = [datetime.datetime.fromisoformat(listed["alice"][name]) for name in ("made", "expires")]
    assert times[1] - times[0] == datetime.timedelta(days=1)
    assert "sha256" not in listed["alice"]
    assert "alice" in plinth("keys", "list", *file)[0]
    plinth("keys", "revoke", "alice", *file)
    assert "has no key of that name" in plinth("keys", "revoke", "alice", *file, code=2)[1]
    assert json.loads(plinth("keys", "list", "--json", *file)[0]) == {}
    (plinth.folder / "plinth.toml").write_text("[serve]\nkeys = 'own.toml'\n")
    config = ("--config", str(plinth.folder / "plinth.toml"))
    plinth("keys", "add", "carol", *config)
    assert "carol" in (plinth.folder / "own.toml").read_text()
    (plinth.folder / "plinth.toml").write_text("")
    assert "no file of keys is named" in plinth("keys", "list", *config, code=2)[1]


def test_rules_and_the_dashboard_are_written_as_json(plinth: Plinth) -> None:
    found = json.loads(plinth("metrics", "rules", "tiny", "--job", "scores")[0])
    assert [group["name"] for group in found["groups"]] == [
        *("plinth-promises", "plinth-burn-rates", "plinth-faults"),
    ]
    assert 'up{job="scores"} == 0' in json.dumps(found).replace("\\", "")
    assert json.loads(plinth("metrics", "dashboard")[0])["title"] == "Plinth"
