"""Retraining again and again beside what serves: shadow, the rule, the swap, the way back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from stores import add_version

from plinth.engine import Engine, ModelStore, Sla
from plinth.pipelines.assembly import running
from plinth.pipelines.cli.main import main
from plinth.pipelines.config.settings import Config
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.schema import Decision
from plinth.verticals.finance.succession.champion import Champion
from plinth.verticals.finance.training.simulator import (
    Population,
    Table,
    labels_json,
    simulate,
    transactions_json,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from commands import Command

pytestmark = pytest.mark.soak

PEOPLE = Population(customers=100, terminals=70, days=112, radius=30, bad_terminals=1.0)
RULE = {"min_labelled": 300, "min_frauds": 20, "min_ap_gain": 0.0}
FIRST, SECOND = 74, 88
"""Days of history that the first training sees, and the second."""
SECONDS = 100.0
EAGER = Config.model_validate({"engine": {"backend": "eager", "precision": "fp32"}})


def log_of(table: Table) -> list[bytes]:
    """Payments, and what became known of each fraud seven days after it, as a topic has them."""
    frauds = table[table["fraud"]]
    known = zip((frauds["time"] + LABEL_DELAY).tolist(), labels_json(frauds), strict=True)
    paid = zip(table["time"].tolist(), transactions_json(table), strict=True)
    return [raw for _, raw in sorted([*paid, *known])]


def between(table: Table, first: int, last: int) -> Table:
    start = PEOPLE.start_ms
    return table[(table["time"] >= start + first * DAY) & (table["time"] < start + last * DAY)]


def publish(folder: Path, table: Table, first: int, last: int) -> None:
    """What came in these days joins the history, under its name once it is whole."""
    now = PEOPLE.start_ms + last * DAY
    frauds = table[table["fraud"] & (table["time"] + LABEL_DELAY < now)]
    lines = [*transactions_json(between(table, first, last)), *labels_json(between(frauds, 0, 999))]
    part = folder / f"{first}.part"
    part.write_bytes(b"\n".join(lines))
    part.rename(folder / f"{first}.jsonl")


class Served:
    """The vertical with a real engine that follows the store; its clock is wound by hand."""

    def __init__(self, store: Path) -> None:
        self.now = 0.0
        settings = FraudSettings.model_validate(
            {"store": store, "challenger": "newest", "promotion": RULE, "max_ahead_seconds": None}
        )
        self.vertical = FraudScoring(settings, clock=lambda: self.now)
        self.engine: Engine

    def score(self, raws: list[bytes]) -> set[Any]:
        """Answer records; by which versions."""
        self.now += 11  # so that the next look at the store compares
        requests = [self.vertical.parse(raw) for raw in raws]
        answers = self.engine.run(self.vertical.infer(requests), Sla()).value
        made = [one for one in answers if isinstance(one, Decision)]
        assert len(made) == len(requests)
        return {one.model_version for one in made if one.score is not None}

    @property
    def version(self) -> str:
        return self.vertical.versions.serving.version

    @property
    def challenger(self) -> str | None:
        ready = self.vertical.versions
        return None if ready.shadow is None else ready.champion.newest_challenger(self.version)


def until(holds: Callable[[], bool], command: Command, step: Callable[[], Any] = int) -> None:
    """Look again and again, while the training goes on."""
    end = monotonic() + SECONDS
    while not holds():
        step()
        assert command.wait(0.02) is None, command.said
        assert monotonic() < end, command.said


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Command]:
    """A poor champion; the command, every second, on a folder that grows."""
    store, history = tmp_path / "models", tmp_path / "history"
    add_version(store, "1.0.0", noise=0.4)
    history.mkdir()
    (tmp_path / "plinth.toml").write_text(f'[verticals.finance]\nstore = "{store}"\n')
    words = f"plinth finance retrain {history} --every 1s --days 14 --epochs 2 --alert-budget 20"
    command = Command(words.split(), tmp_path, {"OMP_NUM_THREADS": "1"}, tmp_path / "said.txt")
    yield command
    command.end()


def test_each_training_is_compared_promoted_by_the_rule_and_can_be_taken_back(
    training: Command, tmp_path: Path
) -> None:
    store, history = tmp_path / "models", tmp_path / "history"
    table = simulate(PEOPLE, seed=5)
    served, champion = Served(store), Champion(store)
    until(lambda: "there is no *.jsonl" in training.said, training)
    publish(history, table, 0, FIRST)
    log = log_of(table)
    started = len(log_of(between(table, 0, FIRST)))
    with running(EAGER, {"finance": served.vertical}, follow=True) as served.engine:
        served.vertical.observe([served.vertical.parse(raw) for raw in log[:started]])
        chunks = [log[at : at + 100] for at in range(started, len(log), 100)]
        traffic = iter(chunks)

        until(lambda: served.challenger is not None, training)
        made = ModelStore(store).versions("fraud")[1]
        assert (served.version, served.challenger) == ("1.0.0", made)
        seen: list[set[Any]] = []
        until(
            lambda: served.version != "1.0.0",
            training,
            lambda: seen.append(served.score(next(traffic))),
        )
        assert set().union(*seen[:-1]) == {"1.0.0"}, "in shadow it decides nothing"
        assert served.score(next(traffic)) == {made}
        last = champion.decisions()[-1]
        assert (last["from"], last["to"], last["by"]) == ("1.0.0", made, "rule")
        assert last["why"]["figures"]["ap_gain"] > 0
        assert last["why"]["figures"]["labelled"] >= RULE["min_labelled"]

        publish(history, table, FIRST, SECOND)
        until(lambda: served.challenger not in (None, made), training)
        newer = served.challenger
        assert served.score(next(traffic)) == {made}
        training.end()

        with pytest.raises(SystemExit) as ended:
            main(["finance", "rollback", "--config", str(tmp_path / "plinth.toml")])
        assert ended.value.code in (0, None)
        end = monotonic() + SECONDS
        while served.version != "1.0.0":
            served.engine.run(served.vertical.infer([]), Sla())
            assert monotonic() < end
        assert served.score(next(traffic)) == {"1.0.0"}
        assert champion.rolled_back() == {made}
        assert champion.newest_challenger("1.0.0") == newer, "only what was taken back is out"
