"""What needs no model imports no torch, which alone takes two seconds of CPU."""

import json
import subprocess
import sys

import pytest

LIGHT = [
    ("--help",),
    ("--version",),
    ("serve", "--help"),
    ("batch", "--help"),
    ("finance", "backtest", "--help"),
    ("keys", "add", "desk", "--file", "keys.toml"),
    ("keys", "list", "--file", "keys.toml"),
    ("metrics", "dashboard"),
    ("metrics", "rules", "--help"),
    ("plan", "--costs", "costs.toml", "--rate", "100", "--deadline", "100"),
    ("cluster", "status", "--address", "127.0.0.1:1"),
    ("audit", "verify", "none.jsonl"),
    ("deidentify", "empty", "--out", "copies"),
    ("archive", "status", "none.toml"),
    ("models", "cache"),
    ("new-vertical", "weather"),
    ("serve", "finance", "--config", "none.toml"),
]
COSTS = "[urgent]\nmax_rows = 64\n[urgent.seconds]\n1 = 0.002\n64 = 0.010\n"
HELP_NEEDS_NOT = ("torch", "numpy", "prometheus_client", "urllib.request")
RUN = """
import json, sys
from typer.testing import CliRunner
from plinth.pipelines.cli.main import app
found = []
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    said = None if done.exception is None else repr(done.exception)
    found.append((words, done.exit_code, said, [m for m in sys.argv[2:] if m in sys.modules]))
print(json.dumps(found))
"""


def run(folder, commands, modules):
    """What each command ended with, and which modules were imported by then, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands), *modules],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_commands_that_need_no_model_import_no_torch(tmp_path):
    (tmp_path / "costs.toml").write_text(COSTS)
    (tmp_path / "empty").mkdir()
    for words, code, said, imported in run(tmp_path, LIGHT, ["torch"]):
        assert imported == [], words
        assert "Error" not in (said or "") or "ConfigError" in said or "DeviceError" in said, words
        assert code in (0, 1), (words, said)
    assert (tmp_path / "keys.toml").exists()


@pytest.mark.parametrize("words", [["--help"], ["batch", "--help"]])
def test_help_imports_next_to_nothing(tmp_path, words):
    assert run(tmp_path, [words], HELP_NEEDS_NOT) == [[words, 0, None, []]]
