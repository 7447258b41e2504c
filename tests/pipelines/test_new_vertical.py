"""``plinth new-vertical``: what it writes installs without a network, and keeps the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plinth.pipelines.cli.main import main


def plinth(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_it_installs_passes_its_tests_and_opens_its_doors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plinth("new-vertical", "pipe_leaks", "--out", str(tmp_path / "leaks")) == 0
    site = tmp_path / "site"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLINTH_")}
    env["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [env.get("PYTHONPATH")])])

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path / "leaks",
            env=env | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    quiet = ("--quiet", "--disable-pip-version-check", "--no-index")
    run("pip", "install", *quiet, "--no-deps", "--no-build-isolation", "--target", str(site), ".")
    assert " passed" in run("pytest", "-p", "no:cacheprovider", "tests")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    assert plinth("check", "pipe_leaks") == 0
    assert "all is well" in capsys.readouterr().err


def test_a_name_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for name, said in (
        ("Leaks", "cannot name a vertical"),
        ("class", "cannot name a vertical"),
        ("../leaks", "cannot name a vertical"),
        ("finance", "is installed"),
        ("there", "is there already"),
    ):
        assert plinth("new-vertical", name) == 2
        assert said in capsys.readouterr().err
