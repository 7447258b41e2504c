"""Hot modules compiled: the same answers, and never those of another source."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plinth import compiled

ROOT = Path(__file__).resolve().parent.parent
STREAM = """
import hashlib, json, random
from plinth import compiled
from plinth.engine import InputError
from plinth.verticals.finance.features import online, program
from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.features.online import FeatureState, Labelled, Limits
from plinth.verticals.finance.features.persistence import pack, unpack

made = [{"name": "amount", "kind": "value", "of": "amount", "reason": "A"}]
for by in ("card", "terminal", "customer", "device"):
    for kind in ("count", "sum", "mean", "max", "min", "recency", "speed"):
        for over in ("1h", "7d"):
            one = {"name": f"{by}_{kind}_{over}", "kind": kind, "by": by, "over": over}
            made.append(one | ({"of": "amount"} if kind in ("sum", "mean", "max", "min") else {}))
    of = "terminal" if by == "card" else "card"
    made.append({"name": f"{by}_ids", "kind": "distinct", "of": of, "by": by, "over": "24h"})
made.append({"name": "risk", "kind": "risk", "by": "terminal", "over": "7d", "after": "1h"})
made.append({"name": "ratio", "kind": "ratio", "of": "amount", "to": "card_mean_7d"})
made[1:] = [one | {"use": "rules"} for one in made[1:]]
every = program.compiled(Declaration.model_validate({"feature": made, "reasons": {"A": "Amount"}}))
digest = hashlib.sha256()
for features in (program.STANDARD, every):
    for limits in (Limits(), Limits(0, 20, 10, 15, 8, 400, 16, 64, 32, 16)):
        chance = random.Random(7)
        state, sent, now = FeatureState(limits, features), [], 1_750_000_000_000
        told = []
        for number in range(4_000):
            now += chance.choice((0, 1, 1_000, 60_000, 3_600_000))
            late = chance.choice((0, 0, 0, 0, 5_000, 86_400_000, 9 * 86_400_000))
            event = (
                f"t{number}", now - late, chance.choice((0.0, 0.01, 12.34, 99.9999, 1e7)),
                f"c{chance.randrange(40)}", f"u{chance.randrange(30)}", f"m{chance.randrange(20)}",
                chance.choice((None, None, f"d{chance.randrange(12)}")),
                chance.choice((None, (52.5, 13.4), (-33.9, 151.2))),
            )
            if sent and chance.random() < 0.1:
                event = chance.choice(sent)
                if chance.random() < 0.5:
                    event = (*event[:2], 77.7, *event[3:])
            elif sent and chance.random() < 0.1:
                old = chance.choice(sent)
                label = Labelled(old[0], old[5], old[1], now, chance.random() < 0.8, old[3])
                try:
                    state.journal = told.append
                    digest.update(repr(state.label(label)).encode())
                except InputError as error:
                    digest.update(str(error).encode())
                continue
            sent.append(event)
            state.journal = told.append
            batch = state.update([event])
            digest.update(batch.rows.tobytes() + batch.flags.tobytes())
            if number % 1_000 == 999:
                again = FeatureState(limits, features)
                if number == 999:
                    for entry in told:
                        again.enter(entry)
                    assert pack(again) == pack(state)
                state = unpack(pack(state), limits, features)
        try:
            state.update([("x", now, -1.0, "c", "u", "m", None, None)])
        except InputError as error:
            digest.update(str(error).encode())
        digest.update(pack(state))
files = [online.__file__, program.STANDARD.row.__code__.co_filename
         if hasattr(program.STANDARD.row, "__code__") else "machine code"]
told = {"digest": digest.hexdigest(), "told": compiled.how_hot_code_runs(), "files": files}
print(json.dumps(told))
"""


def run(source: Path, *words: str, **environment: str) -> str:
    """Python on a copy of the sources, away from this checkout."""
    env = {k: v for k, v in os.environ.items() if k != compiled.SWITCH} | environment
    done = subprocess.run(
        [sys.executable, *words],
        env=env | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        cwd=source, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.soak
def test_compiled_features_are_those_of_the_source_to_the_last_bit(tmp_path: Path) -> None:
    copy = tmp_path / "plinth"
    shutil.copytree(ROOT / "src" / "plinth", copy, ignore=shutil.ignore_patterns("__*__"))
    for package in (ROOT / "src" / "plinth").rglob("__init__.py"):
        place = copy / package.relative_to(ROOT / "src" / "plinth")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package, place)

    def stream(**environment: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(run(tmp_path, "-c", STREAM, **environment))
        return told

    before = stream()
    assert before["told"] == "interpreted; what is compiled is nothing"
    folder = Path(run(tmp_path, "-m", "plinth.compiled").strip())
    now = stream()
    assert (now["told"], now["digest"]) == ("compiled", before["digest"])
    assert now["files"][0].startswith(str(folder))
    assert now["files"][1] == "machine code"
    assert stream(PLINTH_COMPILED="0")["told"] == "interpreted, as PLINTH_COMPILED=0 says"
    timeline = copy / "verticals" / "finance" / "features" / "timeline.py"
    timeline.write_text(timeline.read_text().replace("UNITS = 10_000", "UNITS = 1_000"))
    newer = stream()
    assert newer["told"] == "interpreted; what is compiled is of another source"
    assert newer["digest"] != before["digest"]
    assert newer["files"][0].endswith("online.py")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hot module of its own, and nothing compiled; returns the module's file."""
    here = tmp_path / "plinth"
    (here / "warm").mkdir(parents=True)
    (here / "warm" / "one.py").write_text("ONE = 1\n")
    monkeypatch.setattr(compiled, "HERE", here)
    monkeypatch.setattr(compiled, "FOLDER", here / "__compiled__")
    monkeypatch.setattr(compiled, "HOT", {"plinth.warm": ("one",)})
    monkeypatch.setattr(compiled, "WRITTEN", {})
    monkeypatch.setattr(compiled, "_used", {})
    monkeypatch.delenv(compiled.SWITCH)
    return here / "warm" / "one.py"


def test_what_was_compiled_of_another_source_is_not_found(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.extended(["p"], "plinth.warm") == ["p"]
    assert not compiled.hot_code_is_compiled()
    there = compiled.FOLDER / compiled.digest()
    there.mkdir(parents=True)
    assert compiled.extended(["p"], "plinth.warm") == [str(there / "plinth" / "warm"), "p"]
    assert compiled.how_hot_code_runs() == "compiled"
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.extended(["p"], "plinth.warm") == ["p"]
    monkeypatch.delenv(compiled.SWITCH)
    sources.write_text("ONE = 2\n")
    assert compiled.extended(["p"], "plinth.warm") == ["p"]
    assert compiled.how_hot_code_runs() == "interpreted; what is compiled is of another source"


@pytest.mark.soak
def test_what_cannot_be_compiled_says_so_and_leaves_nothing(sources: Path) -> None:
    sources.write_text("ONE: int = 'text'\n")
    with pytest.raises(compiled.NotCompiled, match="were not compiled"):
        compiled.build()
    assert list(compiled.FOLDER.iterdir()) == []
