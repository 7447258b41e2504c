"""Public sets of frauds, read from files that the user downloaded himself; none comes with Plinth.

| name | file | licence |
|---|---|---|
| ``ulb`` | creditcard.csv | DbCL 1.0; Dal Pozzolo et al., 2015 |
| ``ieee-cis`` | train_transaction.csv | rules of the Kaggle competition |
| ``baf`` | Base.csv | CC BY-NC-SA 4.0; Jesus et al., NeurIPS 2022 |
| ``sparkov`` | fraudTrain.csv | CC0; simulated |
| ``paysim`` | PS_20174392719_1491204439457_log.csv | CC BY-SA 4.0; Lopez-Rojas, 2016; simulated |
| ``tabformer`` | card_transaction.v1.csv | Apache-2.0; Padhi et al., 2021; simulated |

What names a person or a card is dropped, or becomes a number by order of appearance.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError, InputError

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Payments of a public set, ascending in time.

    Args:
        name: of the set.
        time: int64 (n,) in the set's own unit: seconds, hours or months.
        fraud: bool (n,).
        columns: names of the features.
        rows: float32 (n, columns); NaN where nothing stands; texts as numbers by first appearance.
        card: int64 (n,) who pays, as a number; -1 where the set does not say.
    """

    name: str
    time: npt.NDArray[np.int64]
    fraud: npt.NDArray[np.bool_]
    columns: tuple[str, ...]
    rows: npt.NDArray[np.float32]
    card: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Schema:
    """How a set is written.

    Args:
        needed: columns that must be there.
        fraud: column with the answer.
        time: of a row.
        dropped: columns that are no features: answers, ids, persons, times.
        numbers: columns in which a text is a fault, such as a number with a decimal comma.
        card: who pays, if the set says.
    """

    needed: tuple[str, ...]
    fraud: str
    time: Callable[[Row], float]
    dropped: frozenset[str]
    numbers: tuple[str, ...]
    card: Callable[[Row], str] | None = None


def _seconds_of(row: Row) -> float:
    hour, minute = row["Time"].split(":")
    year, month, day = (int(row[name]) for name in ("Year", "Month", "Day"))
    return datetime(year, month, day, int(hour), int(minute), tzinfo=UTC).timestamp()


_LARGEST = float(np.finfo(np.float32).max)
_ANSWERS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
    **dict.fromkeys(("0", "0.0", "false", "no"), False),
}
_CANCELLED = "oldbalanceOrg newbalanceOrig oldbalanceDest newbalanceDest"
"""Frauds of PaySim are cancelled, which its balances tell: its authors say to leave them out."""
_PERSON = "first last street city state zip job dob trans_num cc_num"
SETS: Mapping[str, _Schema] = {
    "ulb": _Schema(
        ("Time", "Amount", "Class", *(f"V{number}" for number in range(1, 29))),
        "Class",
        lambda row: float(row["Time"]),
        frozenset({"Time", "Class"}),
        ("Amount", *(f"V{number}" for number in range(1, 29))),
    ),
    "ieee-cis": _Schema(
        ("TransactionID", "isFraud", "TransactionDT", "TransactionAmt", "card1"),
        "isFraud",
        lambda row: float(row["TransactionDT"]),
        frozenset({"TransactionID", "isFraud", "TransactionDT"}),
        ("TransactionAmt",),
        lambda row: " ".join(row.get(name, "") for name in ("card1", "card2", "addr1")),
    ),
    "baf": _Schema(
        ("fraud_bool", "month", "income", "payment_type"),
        "fraud_bool",
        lambda row: float(row["month"]),
        frozenset({"fraud_bool", "month"}),
        ("income",),
    ),
    "sparkov": _Schema(
        ("cc_num", "merchant", "category", "amt", "unix_time", "merch_lat", "is_fraud"),
        "is_fraud",
        lambda row: float(row["unix_time"]),
        frozenset({"is_fraud", "unix_time", "trans_date_trans_time", "", *_PERSON.split()}),
        ("amt", "merch_lat"),
        lambda row: row["cc_num"],
    ),
    "paysim": _Schema(
        ("step", "type", "amount", "nameOrig", "nameDest", "oldbalanceOrg", "isFraud"),
        "isFraud",
        lambda row: float(row["step"]),
        frozenset(
            {"step", "isFraud", "isFlaggedFraud", "nameOrig", "nameDest", *_CANCELLED.split()}
        ),
        ("amount",),
        lambda row: row["nameOrig"],
    ),
    "tabformer": _Schema(
        ("User", "Card", "Year", "Month", "Day", "Time", "Amount", "MCC", "Is Fraud?"),
        "Is Fraud?",
        _seconds_of,
        frozenset({"User", "Card", "Year", "Month", "Day", "Time", "Is Fraud?"}),
        ("Amount",),
        lambda row: f"{row['User']} {row['Card']}",
    ),
}
"""The sets by name."""


def load(name: str, path: Path, limit: int | None = None) -> PublicSet:
    """Read a set.

    Args:
        name: of :data:`SETS`.
        path: of its file, plain CSV as it is offered.
        limit: rows read at most.

    Raises:
        ConfigError: there is no such set, or the file cannot be read.
        InputError: names file, line and column of what is wrong.
    """
    schema = SETS.get(name)
    if schema is None:
        raise ConfigError(f"there is no set {name!r}", hint=f"known are {', '.join(SETS)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [one for one in schema.needed if one not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path}: has no column {missing[0]}",
                    field=missing[0],
                    hint=f"{name} has {', '.join(schema.needed[:8])}, ...",
                )
            columns = [one for one in reader.fieldnames or () if one not in schema.dropped]
            return _read(name, path, schema, columns, islice(reader, limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _read(
    name: str, path: Path, schema: _Schema, columns: list[str], rows: Iterable[Row]
) -> PublicSet:
    times, fraud, cards, values = [], [], [], []
    texts: dict[str, dict[str, int]] = {c: {} for c in columns if c not in schema.numbers}
    people: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        try:
            times.append(_finite(schema.time(row)))
            fraud.append(_ANSWERS[row[schema.fraud].strip().strip("'\"").lower()])
            if None in row:
                raise ValueError("more columns than the first line has")
            values.append([_number(row[column], texts.get(column)) for column in columns])
        except (ValueError, TypeError, AttributeError, KeyError):
            raise InputError(
                f"{path}:{line}: a time, number or answer cannot be read, or columns are missing "
                "or too many",
                hint="is it the whole file, as it is offered?",
            ) from None
        if schema.card is not None:
            cards.append(people.setdefault(schema.card(row), len(people)))
    if not times:
        raise InputError(f"{path}: has no rows")
    order = np.argsort(times, kind="stable")
    who = np.array(cards or [-1] * len(times), np.int64)
    table: Any = np.array(values, np.float32)
    moments = np.array(times, np.float64).astype(np.int64)
    known = np.array(fraud)
    return PublicSet(name, moments[order], known[order], tuple(columns), table[order], who[order])


def _number(text: str, codes: dict[str, int] | None) -> float:
    """A number, a number with a dollar sign, or that of a text by first appearance.

    Raises:
        ValueError: a text, where there are no ``codes`` for any.
    """
    text = text.strip()
    if not text or text.lower() == "nan":
        return float("nan")
    try:
        if "_" in text:
            raise ValueError("a text, though Python takes 1_000 for a number")
        return _finite(float(text.removeprefix("$")))
    except ValueError:
        if codes is None:
            raise
        return float(codes.setdefault(text, len(codes)))


def _finite(number: float) -> float:
    """A number that float32 holds.

    Raises:
        ValueError: it does not.
    """
    if not abs(number) <= _LARGEST:
        raise ValueError("no number of a payment")
    return number
