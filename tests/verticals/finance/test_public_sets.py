"""Public sets are read by path; here from generated files of the same columns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plinth.engine import ConfigError, InputError
from plinth.verticals.finance.training.public_sets import SETS, load
from plinth.verticals.finance.training.quality import auc

V = {f"V{number}": -0.5 * number for number in range(1, 29)}
CARD = "4111111111111111"
ROWS: dict[str, list[dict[str, Any]]] = {
    "ulb": [
        {"Time": 7, **V, "Amount": 149.62, "Class": "'1'"},
        {"Time": 0, **V, "Amount": 2.69, "Class": 0},
    ],
    "ieee-cis": [
        {"TransactionID": 2987001, "isFraud": 1, "TransactionDT": 86401, "TransactionAmt": 29.0,
         "ProductCD": "W", "card1": 2755, "card2": 404, "addr1": 325, "V1": ""},
        {"TransactionID": 2987000, "isFraud": 0, "TransactionDT": 86400, "TransactionAmt": 68.5,
         "ProductCD": "H", "card1": 13926, "card2": "", "addr1": 315, "V1": 1.0},
    ],
    "baf": [
        {"fraud_bool": 1, "income": 0.9, "payment_type": "AA", "month": 1},
        {"fraud_bool": 0, "income": 0.1, "payment_type": "AB", "month": 0},
    ],
    "sparkov": [
        {"": 1, "trans_date_trans_time": "2019-01-01 00:00:44", "cc_num": CARD, "merchant": "b",
         "category": "grocery_pos", "amt": 107.23, "first": "S", "last": "G", "gender": "F",
         "street": "4", "city": "O", "state": "WA", "zip": 99160, "lat": 48.8, "long": -118.2,
         "city_pop": 149, "job": "x", "dob": "1978-06-21", "trans_num": "1f7",
         "unix_time": 1325376044, "merch_lat": 49.1, "merch_long": -118.1, "is_fraud": 1},
        {"": 0, "trans_date_trans_time": "2019-01-01 00:00:18", "cc_num": CARD, "merchant": "a",
         "category": "misc_net", "amt": 4.97, "first": "J", "last": "B", "gender": "F",
         "street": "5", "city": "M", "state": "NC", "zip": 28654, "lat": 36.0, "long": -81.1,
         "city_pop": 3495, "job": "y", "dob": "1988-03-09", "trans_num": "0b2",
         "unix_time": 1325376018, "merch_lat": 36.0, "merch_long": -82.0, "is_fraud": 0},
    ],
    "paysim": [
        {"step": 2, "type": "TRANSFER", "amount": 181.0, "nameOrig": "C1", "oldbalanceOrg": 181.0,
         "newbalanceOrig": 0.0, "nameDest": "C5", "oldbalanceDest": 0, "newbalanceDest": 0,
         "isFraud": 1, "isFlaggedFraud": 0},
        {"step": 1, "type": "PAYMENT", "amount": 9839.64, "nameOrig": "C2", "oldbalanceOrg": 170136,
         "newbalanceOrig": 160296, "nameDest": "M1", "oldbalanceDest": 0, "newbalanceDest": 0,
         "isFraud": 0, "isFlaggedFraud": 0},
    ],
    "tabformer": [
        {"User": 0, "Card": 1, "Year": 2002, "Month": 9, "Day": 1, "Time": "06:42",
         "Amount": "$38.48", "Use Chip": "Swipe Transaction", "Merchant Name": "-34551508091458520",
         "Merchant City": "La Verne", "Merchant State": "CA", "Zip": 91750.0, "MCC": 5912,
         "Errors?": "", "Is Fraud?": "Yes"},
        {"User": 0, "Card": 0, "Year": 2002, "Month": 9, "Day": 1, "Time": "06:21",
         "Amount": "$-134.09", "Use Chip": "Swipe Transaction", "Merchant Name": "352722790",
         "Merchant City": "Monterey Park", "Merchant State": "CA", "Zip": 91754.0, "MCC": 5300,
         "Errors?": "Bad PIN", "Is Fraud?": "No"},
    ],
}  # fmt: skip
AFTERWARDS: dict[str, list[str]] = {
    "ulb": ["Class"],
    "ieee-cis": ["isFraud"],
    "baf": ["fraud_bool"],
    "sparkov": ["is_fraud"],
    "paysim": ["isFraud", "isFlaggedFraud", "oldbalanceOrg", "newbalanceOrig", "oldbalanceDest",
               "newbalanceDest"],
    "tabformer": ["Is Fraud?"],
}  # fmt: skip
"""What is known only with the answer."""
TIMES = {"ulb": "Time", "ieee-cis": "TransactionDT", "baf": "month", "sparkov": "unix_time",
         "paysim": "step", "tabformer": "Year"}  # fmt: skip
AMOUNT = {"ulb": "Amount", "ieee-cis": "TransactionAmt", "sparkov": "amt", "paysim": "amount"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", list(SETS))
def test_a_set_is_read_in_order_of_time_and_without_answers_and_persons(
    name: str, tmp_path: Path
) -> None:
    """The second row of each file came first; the first is the fraud."""
    found = load(name, write(tmp_path / "set.csv", ROWS[name]))
    assert found.fraud.tolist() == [False, True]
    assert found.time[0] < found.time[1]
    assert found.rows.shape == (2, len(found.columns))
    assert not SETS[name].dropped & set(found.columns), "an answer or a time among the features"
    column = AMOUNT.get(name)
    if column:
        amounts = [row[column] for row in ROWS[name]][::-1]
        np.testing.assert_allclose(found.rows[:, found.columns.index(column)], amounts)
    assert not np.any(found.rows == float(CARD)), "no card number"


def history(name: str, count: int = 400) -> list[dict[str, Any]]:
    """Payments of chance, of which only the answer and the time tell a fraud: those come last."""
    dice = np.random.default_rng(0)
    made = []
    for number in range(count):
        row = {column: dice.random() for column in ROWS[name][0]}
        fraud = number >= count // 2
        answer = ("Yes" if fraud else "No") if name == "tabformer" else int(fraud)
        row |= dict.fromkeys(AFTERWARDS[name], answer) | {TIMES[name]: number}
        if name == "tabformer":
            row |= {"Year": 1900 + number, "Month": 9, "Day": 1, "Time": "06:21"}
        made.append(row)
    return made


@pytest.mark.parametrize("name", list(SETS))
def test_no_column_tells_the_answer_or_the_time(name: str, tmp_path: Path) -> None:
    found = load(name, write(tmp_path / "set.csv", history(name)))
    assert found.fraud.sum() == 200
    assert len(found.columns) >= 2
    told = {c: auc(row, found.fraud) for c, row in zip(found.columns, found.rows.T, strict=True)}
    leaks = {column: value for column, value in told.items() if not 0.35 < value < 0.65}
    assert not leaks, "these tell a fraud, though only what comes with or after the answer does"


def test_texts_and_cards_become_numbers_and_gaps_are_told(tmp_path: Path) -> None:
    cis = load("ieee-cis", write(tmp_path / "cis.csv", ROWS["ieee-cis"]))
    assert cis.rows[:, cis.columns.index("ProductCD")].tolist() == [1, 0]
    assert np.isnan(cis.rows[1, cis.columns.index("V1")])
    assert cis.card.tolist() == [1, 0]
    tab = load("tabformer", write(tmp_path / "tab.csv", ROWS["tabformer"]))
    assert tab.rows[:, tab.columns.index("Amount")].tolist() == pytest.approx([-134.09, 38.48])
    assert load("sparkov", write(tmp_path / "s.csv", ROWS["sparkov"])).card.tolist() == [0, 0]
    assert load("baf", write(tmp_path / "b.csv", ROWS["baf"])).card.tolist() == [-1, -1]


def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no set 'kaggle'"):
        load("kaggle", tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.csv cannot be read"):
        load("ulb", tmp_path / "gone.csv")
    rows = [{**row} for row in ROWS["ulb"]]
    rows[1]["Time"] = "noon"
    with pytest.raises(InputError, match=r"set\.csv:3: a time, number or answer"):
        load("ulb", write(tmp_path / "set.csv", rows))
    with pytest.raises(InputError, match="has no column Class"):
        load("ulb", write(tmp_path / "set.csv", [{"Time": 1, "Amount": 2, **V}]))
    whole = write(tmp_path / "set.csv", ROWS["ulb"]).read_text()
    (tmp_path / "set.csv").write_text(whole[:-40])
    with pytest.raises(InputError, match=r"set\.csv:3"):
        load("ulb", tmp_path / "set.csv")
    assert len(load("ulb", write(tmp_path / "set.csv", ROWS["ulb"]), limit=1).fraud) == 1


@pytest.mark.parametrize("name", AMOUNT)
def test_an_amount_with_a_decimal_comma_is_no_name_of_something(name: str, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS[name]]
    rows[1][AMOUNT[name]] = "9,95"
    with pytest.raises(InputError, match=":3: "):
        load(name, write(tmp_path / "set.csv", rows))


@pytest.mark.parametrize(
    "change",
    [{"Class": "2"}, {"Class": ""}, {"Time": "nan"}, {"Amount": "inf"}, {"Amount": "1e300"},
     {"Amount": "1_000"}, {"Amount": "1,5"}],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_not_taken_for_another(
    change: dict[str, str], tmp_path: Path
) -> None:
    rows = [ROWS["ulb"][0] | change, ROWS["ulb"][1]]
    with pytest.raises(InputError, match=r"set\.csv:2: a time, number or answer"):
        load("ulb", write(tmp_path / "set.csv", rows))


def test_answers_in_other_words_a_byte_order_mark_and_shifted_columns(tmp_path: Path) -> None:
    rows = [ROWS["ulb"][0] | {"Class": "1.0"}, ROWS["ulb"][1] | {"Class": "False"}]
    file = write(tmp_path / "set.csv", rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load("ulb", file).fraud.tolist() == [False, True]
    file.write_bytes(file.read_bytes().replace(b"149.62", b"1,149.62"))
    with pytest.raises(InputError, match="or too many"):
        load("ulb", file)
