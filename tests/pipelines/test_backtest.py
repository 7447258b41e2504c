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
        (["text.jsonl"], "2 records were refused as malformed_json, the first at text.jsonl:1"),
        (["/dev/zero"], "/dev/zero is a device"),
        (["history.jsonl", "--then", "/dev/zero"], "no config file /dev/zero"),
        (["damaged.jsonl.gz"], "is damaged"),
    ],
)
def test_what_is_wrong_is_said_with_its_name(
    history: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    history.with_name("empty.jsonl").write_text("\n")
    history.with_name("text.jsonl").write_text("no\nrecord\n")
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


# -- plinth finance backtest ---------------------------------------------------------------------
RULES = """
[[rule]]
code = "B1"
text = "A limit"
when = "amount > 500"
action = "review"

[[rule]]
code = "B2"
text = "A higher limit"
when = "amount > 650"
action = "decline"

[[rule]]
code = "B3"
text = "Watched"
when = "terminal_id == 't1'"
action = "review"
shadow = true
"""


def try_rules(rules: str, *arguments: object, code: int = 0) -> None:
    Path("tried.toml").write_text(rules)
    with pytest.raises(SystemExit) as ended:
        main(["finance", "backtest", "tried.toml", *map(str, arguments)])
    assert ended.value.code == code


def test_each_rule_is_told_what_it_would_have_stopped(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = json.dumps(payment(4, 9000.0))  # comes twice, counts once
    (history.parent / "more.jsonl.gz").write_bytes(gzip.compress(again.encode()))
    files = ("--history", history, "--history", "more.jsonl.gz")
    try_rules(RULES, *files, "--label-days", 0, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["history"] == {
        "payments": 4,
        "days": 1.0,
        "frauds": 2,
        "genuine": 2,
        "amount": 10310.0,
        "amount_of_frauds": 9600.0,
        "refused": 1,
    }
    by = told["stopped"]
    assert (by["B1"]["payments"], by["B1"]["frauds"], by["B1"]["genuine"]) == (3, 2, 1)
    assert (by["B1"]["amount"], by["B1"]["precision"], by["B1"]["recall"]) == (10300.0, 0.6667, 1.0)
    assert by["B1"]["alone"] == 1, "x2; x3 and x4 are declined by B2 too"
    assert (by["B2"]["payments"], by["B2"]["precision"], by["B2"]["recall"]) == (2, 0.5, 0.5)
    assert by["B2"]["recall_of_amount"] == 0.9375
    assert (by["B2"]["action"], by["B3"]["shadow"]) == ("decline", True)
    assert (by["B3"]["payments"], by["B3"]["alone"], by["B3"]["precision"]) == (1, 1, 0.0)
    assert by["rules"]["payments"] == 3, "a rule in shadow stops nothing"
    assert (by["score"]["payments"], by["score"]["precision"]) == (0, None)
    assert by["rules and score"] == by["rules"]


def test_what_is_too_young_to_be_known_is_neither_fraud_nor_genuine(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_rules(RULES, "--history", history, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["history"]["frauds"], told["history"]["genuine"]) == (2, 1)
    early = history.with_name("early.jsonl")
    early.write_bytes(b"\xef\xbb\xbf" + json.dumps(label(9, True)).encode())
    try_rules(RULES, "--history", early, "--history", history)
    table = capsys.readouterr()
    assert "B1" in table.out
    assert "1 records were refused as unknown_payment, the first at" in table.err
    assert "early.jsonl:1: no payment has" in table.err
    assert "those payments count as genuine" in table.err
    assert "1 records were refused as malformed_json, the first at" in table.err
    assert "history.jsonl:9: the record" in table.err
    assert "4 payments over 1.0 days, 2 known frauds of 9,600.00" in table.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('action = "review"', 'action = "block"'), "rule 1 (B1), action: Input should be 'rev"),
        (("amount > 500", "amonut > 500"), "rule 1 (B1), when: at character 1: amonut is not"),
        (('text = "A higher limit"', ""), "rule 2 (B2), text: Field required"),
        (("shadow = true", "shade = true"), "rule 3 (B3), shade: Extra inputs are not permitted"),
        (("[[rule]]", "[[rule]"), "(at line 2, column"),
    ],
)
def test_a_mistake_is_told_with_file_rule_field_and_what_was_expected(
    history: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], said: str
) -> None:
    try_rules(RULES.replace(*change, 1), "--history", history, code=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "tried.toml: " in told
    assert said in told


def test_limits_of_the_config_give_way_to_the_rules_and_a_history_must_have_payments(
    history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (history.parent / "plinth.toml").write_text(f"[verticals.finance]\n{BY_RULES}hard_amount = 5\n")
    try_rules(RULES, "--history", history)
    (history.parent / "empty.jsonl").write_text(json.dumps(label(1, True)))
    try_rules(RULES, "--history", "empty.jsonl", code=2)
    told = capsys.readouterr().err
    assert "holds no payment" in told
    assert "refused as unknown_payment, the first at empty.jsonl:1: no" in told
    (history.parent / "cut.jsonl.gz").write_bytes(gzip.compress(history.read_bytes())[:-9])
    try_rules(RULES, "--history", "cut.jsonl.gz", code=2)
    assert "cut.jsonl.gz is damaged" in capsys.readouterr().err
