"""``plinth cluster``: nodes that are started, seen and ended by the command."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from plinth.engine import DeviceError
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
