"""Make the sample transactions, and the labels that became known of them, from the simulator.

python sample_data/make_transactions.py                       # remake sample_data/transactions
python sample_data/make_transactions.py /tmp/big --customers 5000 --days 183
"""

from __future__ import annotations

import argparse
import gzip
from datetime import UTC, datetime
from pathlib import Path

from plinth.verticals.finance.training.simulator import (
    Population,
    labels_json,
    simulate,
    transactions_json,
)

START = datetime(2026, 9, 1, tzinfo=UTC)


def write(path: Path, records: list[bytes]) -> None:
    """Write JSON lines, gzip without a time or name in it."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as lines:
        lines.write(b"".join(record + b"\n" for record in records))


def main(arguments: list[str] | None = None) -> None:
    """Write both files into the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parent / "transactions"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    parser.add_argument("--customers", type=int, default=300)
    parser.add_argument("--terminals", type=int, default=600)
    parser.add_argument("--days", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args(arguments)
    people = Population(given.customers, given.terminals, given.days, START)
    table = simulate(people, seed=given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    write(given.folder / "transactions.jsonl.gz", list(transactions_json(table)))
    write(given.folder / "labels.jsonl.gz", list(labels_json(table)))
    frauds = int(table["fraud"].sum())
    print(f"{len(table)} transactions, {frauds} of them fraud, in {given.folder}")


if __name__ == "__main__":
    main()
