"""Models are trained repeatably, on simulated payments or on a user's own records."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from payments import DAY, HOUR, NOON, label, payment
from rich.console import Console
from torch.nn import functional

from plinth.engine import ConfigError, InputError, ModelStore
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.schema import Label
from plinth.verticals.finance.training.history import recorded, simulated
from plinth.verticals.finance.training.simulator import (
    Population,
    labels_json,
    rfc3339,
    simulate,
    transactions_json,
)
from plinth.verticals.finance.training.train import RECIPES, Plan, fit, main, run

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE = Population(customers=150, terminals=60, days=80, radius=50, bad_terminals=0.3)
TINY = Plan(first_day=38, final_days=7, epochs=2, alert_budget=5)


def ignore(done: int) -> None:
    assert done > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The simulated payments as a user would have them on disk."""
    folder = tmp_path_factory.mktemp("records")
    table = simulate(PEOPLE, seed=3)
    with gzip.open(folder / "transactions.jsonl.gz", "wb") as lines:
        lines.writelines(raw + b"\n" for raw in transactions_json(table))
    (folder / "labels.jsonl").write_bytes(b"\n".join(labels_json(table)))
    return [folder / "labels.jsonl", folder / "transactions.jsonl.gz"]


def test_training_is_repeatable_and_what_it_stores_scores(tmp_path: Path) -> None:
    for store in ("one", "two"):
        run(
            TINY,
            partial(simulated, PEOPLE, 3),
            tmp_path / store,
            seed=3,
            version="2.0.0",
            source="a test",
            console=Console(quiet=True),
        )
    first, second = (
        {spec.name: spec for spec in ModelStore(tmp_path / store).list()}
        for store in ("one", "two")
    )
    assert first.keys() == {"fraud", "fraud-lite"}
    assert first == second
    for name, weights in (("fraud", "weights.packed"), ("fraud-lite", "weights.safetensors")):
        made, again = (tmp_path / store / name / "2.0.0" / weights for store in ("one", "two"))
        assert made.read_bytes() == again.read_bytes()
    vertical = FraudScoring(FraudSettings(store=tmp_path / "one"))
    assert [variant.version for variant in vertical.variants] == ["2.0.0", "2.0.0"]


def test_the_cheaper_variant_is_the_best_logistic_regression() -> None:
    """No step makes it better: with the ridge, the gradient of its loss is zero."""
    data = simulated(PEOPLE, 3, ignore)
    rows = data.between(38, 21)
    model = fit(RECIPES[1], data, rows, epochs=1, seed=0, advance=ignore)
    truth = torch.from_numpy(data.table["fraud"][rows]).float()[:, None]
    missed = functional.binary_cross_entropy_with_logits(
        model.logits(torch.from_numpy(data.rows[rows])), truth, reduction="sum"
    )
    weight, bias = model.body.parameters()
    whole = missed + weight.square().sum() / 2
    for steepest in torch.autograd.grad(whole, (weight, bias)):
        assert float(steepest.abs().max()) < 1.0, "hundreds at weights of zero"


def test_recorded_payments_give_what_simulated_ones_give(files: list[Path]) -> None:
    read, made = recorded(files, {"EUR": 1.0}, ignore), simulated(PEOPLE, 3, ignore)
    assert read.rows.tobytes() == made.rows.tobytes()
    assert bool(np.all(read.table["fraud"] == made.table["fraud"]))
    assert bool(np.all(read.day == made.day))


def test_training_rows_are_what_serving_saw_where_payments_come_late(tmp_path: Path) -> None:
    """12 % of the payments come up to three days late, labels after a week: no value differs."""
    people = Population(customers=60, terminals=30, days=60, radius=40, bad_terminals=0.3)
    table, dice = simulate(people, seed=9), np.random.default_rng(1)
    table["time"] += np.arange(len(table)) % 1000  # no two in one millisecond have an order
    late = np.where(dice.random(len(table)) < 0.12, dice.integers(0, 3 * DAY, len(table)), 0)
    frauds = table[table["fraud"]]
    came = [*(table["time"] + late).tolist(), *(frauds["time"] + 7 * DAY).tolist()]
    raws = [*transactions_json(table), *labels_json(frauds)]
    told = [
        orjson.dumps({**orjson.loads(raw), "received_time": rfc3339(at)})
        for raw, at in zip(raws, came, strict=True)
    ]
    order = np.argsort(came, kind="stable")
    vertical = FraudScoring(FraudSettings(max_ahead_seconds=None))
    served: dict[str, bytes] = {}
    for at in order:
        record = vertical.parse(raws[at])
        if isinstance(record, Label):
            vertical.observe([record])
        else:
            (event,) = vertical._taken_in([record], vertical._asked([record]), [], [])
            row = vertical.state.update([event]).rows[0, :21]
            served[record.transaction_id] = row.tobytes()

    def differing(lines: list[bytes]) -> int:
        dice.shuffle(lines)  # type: ignore[arg-type]
        (tmp_path / "history.jsonl").write_bytes(b"\n".join(lines))
        data = recorded([tmp_path / "history.jsonl"], {"EUR": 1.0}, ignore)
        names = [f"x{number:08d}" for number in range(len(table))]
        rows = zip(names, data.rows, strict=True)
        return sum(served[name] != row.tobytes() for name, row in rows)

    assert differing(told) == 0
    assert differing(list(raws)) > len(table) / 10, "without the time of receipt they would"


def test_the_command_trains_on_records(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--records", *map(str, files), "--epochs", "1", "--version", "3.1.0"]
    out = ["--out", str(tmp_path)]
    assert main([*words, *out]) == 0
    assert "fold_ap_mean" in capsys.readouterr().out
    spec = ModelStore(tmp_path).verify("fraud")
    assert spec.version == "3.1.0"
    assert spec.source is not None
    assert "recorded" in spec.source
    assert main([*words, *out]) == 2
    assert "already" in capsys.readouterr().err
    assert main([*words, *out, "--first-day", "60", "--version", "4"]) == 2
    assert "80 days of payments, 102 are needed" in capsys.readouterr().err
    assert main([*words, *out, "--rate", "EUR", "--version", "4"]) == 2
    assert "--rate EUR" in capsys.readouterr().err


def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(payment(1) + b"\n\n" + payment(2, amount=-1.0) + b"\n")
    with pytest.raises(InputError, match=r"mine\.jsonl:3: amount") as caught:
        recorded([file], {"EUR": 1.0}, ignore)
    assert caught.value.field == "amount"
    file.write_bytes(payment(1, currency="USD"))
    with pytest.raises(InputError, match=r"mine\.jsonl:1: currency"):
        recorded([file], {"EUR": 1.0}, ignore)


def test_records_may_be_in_disorder_repeated_and_relabelled(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    raws = [
        label(2, NOON + HOUR, NOON + 2 * DAY),
        payment(2, NOON + HOUR, amount=9.0),
        payment(1, NOON),
        payment(2, NOON + HOUR, amount=9.0),
        label(1, NOON, NOON + 3 * DAY),
        label(2, NOON + HOUR, NOON + 4 * DAY, fraud=False),
    ]
    file.write_bytes(b"\n".join(raws))
    data = recorded([file], {"EUR": 2.0}, ignore)
    assert data.table["amount"].tolist() == [85.0, 18.0]
    assert data.table["fraud"].tolist() == [True, False]
    assert data.days == 1


def test_a_label_with_a_card_is_of_that_cards_payment_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    known = json.loads(label(1, NOON, NOON + 2 * DAY)) | {"card": "tok_a"}
    raws = [json.loads(payment(1, NOON)) | {"card": card} for card in ("tok_a", "tok_b")]
    file.write_text("\n".join(map(json.dumps, [*raws, known])))
    assert recorded([file], {"EUR": 1.0}, ignore).table["fraud"].tolist() == [True, False]


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(ConfigError, match="no transactions"):
        recorded([empty], {"EUR": 1.0}, ignore)
    with pytest.raises(ConfigError, match="not a file"):
        recorded([tmp_path / "absent"], {"EUR": 1.0}, ignore)
    calm = Population(customers=20, terminals=20, days=81, bad_terminals=0, bad_cards=0)
    with pytest.raises(ConfigError, match="no fraud labels"):
        TINY.check(simulated(calm, 1, ignore))


def test_a_week_without_both_kinds_is_refused_and_nothing_stored(tmp_path: Path) -> None:
    """Cards known as defrauded leave the tests: where all have been, nothing could be measured."""
    data = simulated(PEOPLE, 3, ignore)
    data.table["fraud"][data.day < TINY.first_day + 7] = True
    told = {"seed": 0, "version": "1", "source": "", "console": Console(quiet=True)}
    with pytest.raises(ConfigError, match="0 frauds in"):
        run(TINY, lambda advance: data, tmp_path, **told)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_longer_histories_are_used_up_to_their_newest_days() -> None:
    data = simulated(Population(customers=5, terminals=5, days=100, radius=60), 1, ignore)
    plan = TINY.ending(data)
    assert plan.days == 100 - 1 - 7
    assert plan.days - plan.first_day == TINY.days - TINY.first_day
    short = simulated(Population(customers=5, terminals=5, days=75, radius=60), 1, ignore)
    assert TINY.ending(short) == TINY, "never before the windows are full"
