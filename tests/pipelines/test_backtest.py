"""``plinth backtest``: the same history under two settings, side by side."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from plinth.pipelines.cli.main import main

TIME = "2026-03-02T12:{:02d}:00Z"


def payment(number: int, amount: float) -> dict[str, Any]:
    return {
        "transaction_id": f"x{number}",
        "event_time": TIME.format(number),
        "amount": amount,
        "currency": "EUR",
        "card": f"tok_{number}",
        "customer_id": f"c{number}",
        "terminal_id": f"t{number}",
    }


def label(number: int, fraud: bool) -> dict[str, Any]:
    keys = ("transaction_id", "event_time", "terminal_id", "card")
    told = {key: value for key, value in payment(number, 0).items() if key in keys}
    return {**told, "fraud": fraud, "label_time": "2026-03-09T12:00:00Z"}


HISTORY = [
    payment(1, 10.0),
    payment(2, 600.0),
    payment(3, 700.0),
    payment(4, 9000.0),
    label(2, True),
    label(3, False),
    label(4, True),
]


BY_RULES = "review_threshold = 1.0\ndecline_threshold = 1.0\n"
"""No score reaches them."""


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "history.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in HISTORY) + "\n\n{not json\n")
    (tmp_path / "rules.toml").write_text(
        '[[rule]]\ncode = "B1"\ntext = "A limit"\nwhen = "amount > 500"\naction = "review"\n'
    )
    (tmp_path / "plinth.toml").write_text(f"[verticals.finance]\n{BY_RULES}")
    return file


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["backtest", "finance", *map(str, arguments)])
    assert ended.value.code == code


def test_rules_are_tried_on_a_history_before_they_go_live(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(history, "--set", "rules=rules.toml", "--json")
    told = json.loads(capsys.readouterr().out)
    now, then = told["now"], told["then"]
    assert now["payments"] == then["payments"] == 4
    assert now["refused"] == 1, "the line that is no record"
    assert now["declined"] == 1, "R01: above 5,000"
    assert (then["declined"], then["reviewed"], then["reason B1"]) == (0, 3, 3)
    assert then["labelled frauds"] == then["frauds stopped"] == 2
    assert then["amount of frauds stopped"] == 9600.0
    assert (then["genuine stopped"], then["precision"], then["recall"]) == (1, 0.6667, 1.0)
    assert {"now": "decline", "then": "review", "records": 1} in told["changed"]


def test_a_packed_history_and_another_config_file_are_read(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = history.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(history.read_bytes()))
    other = history.with_name("other.toml")
    other.write_text(f"[verticals.finance]\nhard_amount = 650.0\n{BY_RULES}")
    run(packed, "--then", other)
    out = capsys.readouterr().out
    assert "difference" in out
    assert "Decided otherwise" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.jsonl"], "cannot read absent.jsonl"),
        (["history.jsonl", "--set", "rules"], "is not KEY=VALUE"),
        (["history.jsonl", "--set", "ruls=x.toml"], "did you mean"),
        (["history.jsonl", "--set", "rules=absent.toml"], "cannot read absent.toml"),
        (["empty.jsonl"], "the history holds no record"),
        (["damaged.jsonl.gz"], "is damaged"),
    ],
)
def test_what_is_wrong_is_said_with_its_name(
    history: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    history.with_name("empty.jsonl").write_text("\n")
    history.with_name("damaged.jsonl.gz").write_bytes(gzip.compress(history.read_bytes())[:-9])
    run(*arguments, code=2)
    assert said in " ".join(capsys.readouterr().err.split())


def test_of_a_line_that_is_too_long_only_the_beginning_is_read(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with history.open("a") as file:
        file.write('{"extra": "' + "x" * 3_000_000 + '"}\n' + json.dumps(payment(9, 5.0)) + "\n")
    run(history, "--json")
    now = json.loads(capsys.readouterr().out)["now"]
    assert (now["payments"], now["refused"]) == (5, 2)
