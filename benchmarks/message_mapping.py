"""CPU time that a declared mapping adds to a record of the fraud vertical."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from head import parser_of, print_json

from plinth.pipelines.formats.mapping import load_mapping
from plinth.verticals.finance import FraudScoring

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def microseconds(work: Callable[[], Any], repeats: int) -> float:
    """CPU time of one call, the least of five rounds."""
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(repeats):
            work()
        best = min(best, time.process_time() - began)
    return best / repeats * 1e6


def main() -> None:
    """Print microseconds a record."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=20_000)
    given = parser.parse_args()
    repeats = given.repeats
    vertical = FraudScoring()
    mapping = load_mapping(EXAMPLES / "mapping.toml", vertical)
    message = (EXAMPLES / "messages.jsonl").read_bytes().splitlines()[0]
    record = mapping.record(message)
    assert record is not None
    mapped = microseconds(lambda: mapping.record(message), repeats)
    read = microseconds(lambda: vertical.parse_at(record, None), repeats)
    if given.json:
        print_json({"microseconds": {"map": round(mapped, 2), "read": round(read, 2)}})
        return
    print(f"mapping a message of {len(message)} bytes with 7 fields: {mapped:.1f} us")
    print(f"reading the record of {len(record)} bytes it becomes: {read:.1f} us")


if __name__ == "__main__":
    main()
