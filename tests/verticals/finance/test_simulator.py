"""Simulated payments are what the published simulator gives."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plinth.engine import ConfigError
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.schema import Label, Transaction, read
from plinth.verticals.finance.training.simulator import (
    BIG_AMOUNT,
    Population,
    Table,
    labels_json,
    simulate,
    transactions_json,
)

SAMPLES = Path(__file__).resolve().parents[3] / "sample_data"


@pytest.fixture(scope="module")
def published() -> Table:
    """The published setting: 5,000 customers, 10,000 terminals, 183 days."""
    return simulate(seed=5)


def test_counts_are_the_published_ones(published: Table) -> None:
    """Published: 1,754,155 payments, 14,681 frauds, by scenario 973, 9,077 and 4,631."""
    assert len(published) == pytest.approx(1_754_155, rel=0.04)
    assert published["fraud"].mean() == pytest.approx(14_681 / 1_754_155, rel=0.08)
    for scenario, count in ((1, 973), (2, 9_077), (3, 4_631)):
        assert (published["scenario"] == scenario).sum() == pytest.approx(count, rel=0.25)


def test_payments_are_in_order_in_cents_and_by_day(published: Table) -> None:
    assert bool(np.all(np.diff(published["time"]) >= 0))
    assert bool(np.all(published["transaction"] == np.arange(len(published))))
    cents = published["amount"] * 100
    np.testing.assert_allclose(cents, cents.round(), atol=1e-6)
    assert published["amount"].min() >= 0.01
    assert published["amount"].mean() == pytest.approx(53.6, rel=0.03)
    second = published["time"] % DAY / 1000
    assert second.mean() == pytest.approx(43_200, rel=0.01)


def test_frauds_are_of_three_kinds(published: Table) -> None:
    kind, amount = published["scenario"], published["amount"]
    assert bool(np.all(amount[kind == 1] > BIG_AMOUNT))
    assert bool(np.all(kind[amount > BIG_AMOUNT] > 0))
    assert np.median(amount[kind == 3]) > 3 * np.median(amount[kind == 0])
    assert np.median(amount[kind == 2]) == pytest.approx(np.median(amount[kind == 0]), rel=0.15)
    assert bool(np.all((kind > 0) == published["fraud"]))


def test_a_compromised_terminal_stays_so_for_its_days() -> None:
    people = Population(customers=50, terminals=5, days=40, radius=200, bad_terminals=0.05)
    table = simulate(people, seed=2)
    hit = np.unique(table["terminal"][table["scenario"] == 2])
    assert len(hit)
    for terminal in hit:
        rows = table[table["terminal"] == terminal]
        bad = rows["time"][rows["scenario"] == 2]
        inside = rows[(rows["time"] >= bad[0]) & (rows["time"] < bad[0] + 27 * DAY)]
        assert bool(np.all(inside["fraud"]))


def test_the_seed_decides() -> None:
    people = Population(customers=20, terminals=20, days=5, radius=50)
    first, again, other = simulate(people, seed=1), simulate(people, seed=1), simulate(people)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("wrong", [{"customers": 0}, {"days": -1}, {"terminals": 10_000_000}])
def test_impossible_populations_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Population(**wrong)


def test_records_of_the_simulator_are_read() -> None:
    people = Population(customers=20, terminals=10, days=9, radius=100, bad_terminals=1)
    table = simulate(people, seed=1)
    for raw, row in zip(transactions_json(table), table, strict=True):
        made = read(raw)
        assert isinstance(made, Transaction)
        assert made.amount == row["amount"]
    made_labels = [read(raw) for raw in labels_json(table)]
    assert len(made_labels) == table["fraud"].sum() > 0
    for made_label in made_labels:
        assert isinstance(made_label, Label)
        delay = made_label.label_time - made_label.event_time
        assert delay.total_seconds() * 1000 == LABEL_DELAY


def lines(path: Path) -> list[bytes]:
    return gzip.decompress(path.read_bytes()).splitlines()


def test_the_sample_is_what_its_script_makes(tmp_path: Path) -> None:
    script = SAMPLES / "make_transactions.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for name in ("transactions.jsonl.gz", "labels.jsonl.gz"):
        assert lines(tmp_path / name) == lines(SAMPLES / "transactions" / name)


def test_the_sample_is_described() -> None:
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Transactions") :]
    for name in ("transactions.jsonl.gz", "labels.jsonl.gz"):
        path = SAMPLES / "transactions" / name
        [said] = re.findall(rf"`transactions/{name}`.*`([0-9a-f]{{64}})`", section)
        assert said == hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"{len(lines(path)):,}" in section


def test_samples_are_valid_and_hold_no_card_number() -> None:
    records = lines(SAMPLES / "transactions" / "transactions.jsonl.gz")
    assert 20_000 <= len(records) <= 25_000
    assert all(isinstance(read(raw), Transaction) for raw in records[::10])
    assert all(json.loads(raw)["card"].startswith("tok_") for raw in records[::10])
    labels = lines(SAMPLES / "transactions" / "labels.jsonl.gz")
    assert all(isinstance(read(raw), Label) for raw in labels)
