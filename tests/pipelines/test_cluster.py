"""``plinth cluster``: nodes that are started, seen and ended by the command."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from plinth.engine import DeviceError
from plinth.engine.lanes.cluster import node as node_script
from plinth.engine.lanes.cluster import nodes
from plinth.engine.lanes.cluster.nodes import Wanted, start

pytestmark = pytest.mark.needs("ray")


def cluster(*words: str, home: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "plinth", "cluster", *words],
        env={
            **os.environ,
            "TMPDIR": home,
            "RAY_AUTH_TOKEN_PATH": f"{home}/token",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_who_joins_where_nobody_listens_is_told_at_once(tmp_path):
    token, port = tmp_path / "token", free_port()
    token.write_text("t" * 64)
    token.chmod(0o600)
    with pytest.raises(DeviceError, match=f"nothing answers at 127.0.0.1:{port}"):
        start(Wanted(head=False, address=f"127.0.0.1:{port}", token_file=token), tmp_path)
    assert not list(tmp_path.glob("node-*"))


@pytest.fixture
def node(monkeypatch, tmp_path):
    """Starts a node whose process runs the given lines."""

    def begin(lines: str, seconds: float = 30.0) -> None:
        script = tmp_path / "node.py"
        script.write_text("import json, os, signal, subprocess, sys, time\n" + lines)
        monkeypatch.setattr(nodes, "script", SimpleNamespace(__file__=str(script)))
        monkeypatch.setattr(nodes, "ANSWER_SECONDS", seconds)
        address, token = f"127.0.0.1:{free_port()}", tmp_path / "token"
        start(Wanted(head=True, address=address, token_file=token), tmp_path)

    return begin


@pytest.fixture
def interruptible():
    """Ctrl-C is heard, though it is not by default in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_start_leaves_no_process(interruptible, node, tmp_path):
    began = tmp_path / "began"
    with pytest.raises(KeyboardInterrupt):
        node(
            "print(json.dumps({'starts': True}), flush=True)\n"
            "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
            f"open({str(began)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
            "os.kill(os.getppid(), signal.SIGINT)\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})\n"
            "child.wait()"
        )
    left = [psutil.Process(int(pid)) for pid in began.read_text().split() if alive(int(pid))]
    assert not psutil.wait_procs(left, 5)[1]
    assert not list(tmp_path.glob("*.json"))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("signal.pause()", "does not answer as the head of a cluster within 0.5 s"),
        ("print(json.dumps({'error': 'no room'}), flush=True)", "the node did not start: no room"),
        ("sys.exit(3)", "it ended before it ran"),
    ],
)
def test_a_node_that_does_not_start_is_told_and_ended(node, monkeypatch, lines, why):
    given, discard = [], nodes._discard
    monkeypatch.setattr(nodes, "_discard", lambda each: (given.append(each), discard(each)))
    with pytest.raises(DeviceError, match=why):
        node(lines, 0.5 if "0.5" in why else 30.0)
    assert [each.returncode is not None for each in given] == [True]


def test_a_node_that_nobody_hears_ends(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    told = {"environment": {}, "head": True, "address": f"127.0.0.1:{free_port()}"}
    with os.fdopen(writer, "wb") as out:
        command = [sys.executable, "-P", node_script.__file__, json.dumps(told)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_store_that_would_lie_on_a_disk_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(node_script, "_SHARED_MEMORY", tmp_path)
    found = os.statvfs(tmp_path)
    free = found.f_bsize * found.f_bavail
    node_script._refuse_little_memory(free // 2)
    with pytest.raises(node_script._RefusedError, match=r"MB free.*--store-mb.*--shm-size"):
        node_script._refuse_little_memory(2 * free)


@pytest.mark.soak
def test_a_head_is_started_joined_seen_and_ended():
    port, small = free_port(), ("--cpus", "1", "--gpus", "0", "--store-mb", "100")
    with tempfile.TemporaryDirectory(prefix="plc") as home:
        try:
            started = cluster("start", "--port", port, "--label", "zone=a", *small, home=home)
            assert "listens on this machine alone" in started.stderr
            assert Path(home, "token").stat().st_mode & 0o777 == 0o600
            again = cluster("start", "--port", port, home=home, code=1)
            assert "Address already in use" in again.stderr
            joined = cluster("join", f"127.0.0.1:{port}", "--json", *small, home=home)
            Path(home, "other").write_text("o" * 64)
            Path(home, "other").chmod(0o600)
            wrong = ("--token-file", f"{home}/other")
            for words in (("join", f"127.0.0.1:{port}"), ("status", f"--address=127.0.0.1:{port}")):
                refused = cluster(*words, *wrong, home=home, code=1)
                assert "refuses the token" in refused.stderr
            seen = cluster("status", "--address", f"127.0.0.1:{port}", "--json", home=home)
            machines = json.loads(seen.stdout)["machines"]
            assert [each["labels"] for each in machines if each["labels"]] == [{"zone": "a"}]
            assert json.loads(joined.stdout)["node"] in {each["node"] for each in machines}
        finally:
            ended = cluster("stop", "--json", home=home)
        assert [each["head"] for each in json.loads(ended.stdout)] == [False, True]
        assert json.loads(cluster("stop", "--json", home=home).stdout) == []


def test_what_is_no_pair_is_refused(tmp_path):
    refused = cluster("start", "--label", "zone", home=str(tmp_path), code=2)
    assert "is not name=value" in refused.stderr


def test_where_nothing_answers_status_says_what_to_do(tmp_path):
    told = cluster("status", "--address", f"127.0.0.1:{free_port()}", home=str(tmp_path), code=1)
    assert "nothing answers" in told.stderr
    assert "plinth cluster start" in told.stderr
