"""Sums that travel while another micro-batch computes: the share of time blocked in them.

    sudo python benchmarks/gang_overlap.py [--blocked 0.32] [--rounds 12] [--parts 2] [--json]

Two ranks of a tensor-parallel gang, each in a network namespace of its own, joined by a pair of
virtual links with a token-bucket filter at either end (``ip netns``, ``tc ... tbf``; needs root and
Linux). The rate of the link is set so that a whole batch at once is blocked for about the share
asked for. Then whole batches, the same micro-batches one after the other without overlap, and
micro-batches in turns are run by turns in the same processes. Outputs are held against each other
bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from head import parser_of, print_json, print_rows

from plinth.engine.gang.plan import ParallelPlan, Seat
from plinth.engine.gang.rank import Rank
from plinth.engine.models.families import find

SIZES = {"vocabulary": 1000, "width": 512, "depth": 8, "heads": 8, "inner": 2048, "positions": 128}
ROWS, TOKENS = 8, 128
BATCH_BYTES = 2 * SIZES["depth"] * ROWS * TOKENS * SIZES["width"] * 4
"""What a rank sends of the sums of a batch: two a block, float32."""
SECONDS = 60.0
WAYS = ("whole", "in parts, no overlap", "in turns")
_SPACES = ("plinth-gang-0", "plinth-gang-1")


# -- one rank ---------------------------------------------------------------------------------
def rank_main(number: int, meeting: str, parts: int) -> None:
    """Answer lines: a number of rounds is run, and told as a line of JSON."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = f"plinth{number}"
    plan = ParallelPlan(tensor=2)
    rank = Rank(Seat(plan, number, meeting, "cpu", "gloo", SECONDS, parts))
    model = find("bert").model(SIZES)
    ids = torch.randint(0, SIZES["vocabulary"], (ROWS, TOKENS), generator=_seeded())
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = model.run(rows) if number == 0 else {}
    rank.load("bert", model)
    for line in sys.stdin:
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        bits: dict[str, dict[str, torch.Tensor]] = {}
        for _ in range(int(line)):
            for way in WAYS:
                rank.micro_batches = parts if way == "in turns" else 1
                cut = parts if way == "in parts, no overlap" else 1
                blocked, begun = rank.blocked, perf_counter()
                made = [
                    rank.run("bert", {key: each.tensor_split(cut)[n] for key, each in rows.items()})
                    for n in range(cut)
                ]
                seconds = perf_counter() - begun
                found[way].append((seconds, (rank.blocked - blocked) / seconds))
                bits[way] = {key: torch.cat([each[key] for each in made]) for key in made[0]}
        print(
            json.dumps(
                {
                    "ways": found,
                    "bit_equal": {
                        way: all(
                            torch.equal(bits["in turns"][key], bits[way][key]) for key in bits[way]
                        )
                        for way in WAYS[:2]
                    },
                    "off_the_model": {
                        key: float((bits["in turns"][key] - each).abs().max())
                        for key, each in want.items()
                    },
                }
            ),
            flush=True,
        )
    rank.close()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# -- the link ---------------------------------------------------------------------------------
def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


@contextmanager
def two_spaces() -> Iterator[None]:
    """Two network namespaces with a link between them."""
    try:
        for space in _SPACES:
            _ip("netns", "add", space)
        ends = ("plinth0", "netns", _SPACES[0]), ("plinth1", "netns", _SPACES[1])
        _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, space in enumerate(_SPACES):
            _ip(
                "-n", space, "address", "add", f"10.199.0.{1 + number}/24", "dev", f"plinth{number}"
            )
            _ip("-n", space, "link", "set", f"plinth{number}", "up")
        yield
    finally:
        for space in _SPACES:
            subprocess.run(["ip", "netns", "delete", space], check=False)


def shape(megabits: float) -> None:
    """Let so many megabits a second through, in either direction."""
    for number, space in enumerate(_SPACES):
        subprocess.run(
            ["ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", f"plinth{number}",
             "root", "tbf", "rate", f"{megabits:.0f}mbit", "burst", "256kb", "latency", "100ms"],
            check=True,
        )  # fmt: skip


# -- both -------------------------------------------------------------------------------------
class Both:
    """The two processes."""

    def __init__(self, folder: Path, parts: int) -> None:
        meeting = (folder / "meet").as_uri()
        self._ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, __file__, "--rank", str(number),
                 "--meeting", meeting, "--parts", str(parts)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for number, space in enumerate(_SPACES)
        ]  # fmt: skip

    def rounds(self, count: int) -> dict[str, Any]:
        """Run rounds; the first rank's figures, with the larger share blocked of the two."""
        for each in self._ranks:
            assert each.stdin is not None
            each.stdin.write(f"{count}\n")
            each.stdin.flush()
        told = []
        for each in self._ranks:
            assert each.stdout is not None
            told.append(json.loads(each.stdout.readline()))
        first = told[0]
        for way in WAYS:
            pairs = zip(*(each["ways"][way] for each in told), strict=True)
            first["ways"][way] = [(a[0], max(a[1], b[1])) for a, b in pairs]
        return dict(first)

    def end(self) -> None:
        """Let them end."""
        for each in self._ranks:
            if each.stdin is not None:
                each.stdin.close()
            try:
                each.wait(10)
            except subprocess.TimeoutExpired:
                each.kill()


def measure(share: float, rounds: int, parts: int) -> dict[str, Any]:
    """Shape the link so that a whole batch is blocked for a share, and run all three ways."""
    with tempfile.TemporaryDirectory() as folder, two_spaces():
        both = Both(Path(folder), parts)
        try:
            both.rounds(2)
            times = both.rounds(4)["ways"]["whole"]
            computing = median(seconds * (1 - blocked) for seconds, blocked in times)
            megabits = BATCH_BYTES * 8e-6 / (computing * share / (1 - share))
            for _ in range(3):  # what is sent also costs time to copy: nearer by turns
                shape(megabits)
                found = median(each for _, each in both.rounds(3)["ways"]["whole"])
                megabits *= (found / (1 - found)) / (share / (1 - share))
            shape(megabits)
            return both.rounds(rounds) | {"megabits": megabits, "parts": parts}
        finally:
            both.end()


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--blocked", type=float, default=0.32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting", default="")
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.meeting, given.parts)
        return
    found = measure(given.blocked, given.rounds, given.parts)
    if given.json:
        print_json(found)
        return
    print(f"link: {found['megabits']:.0f} Mbit/s either way; {found['parts']} micro-batches")
    rows = []
    for way, times in found["ways"].items():
        seconds, shares = zip(*times, strict=True)
        spread = f"{min(shares):.1%} to {max(shares):.1%}"
        rows.append([way, round(1e3 * median(seconds)), f"{median(shares):.1%}", spread])
    print_rows(["how", "ms a batch", "blocked, median", "least to most"], rows)
    print("bit for bit the same in turns as:", found["bit_equal"])
    print("furthest off the model in one process:", found["off_the_model"])


if __name__ == "__main__":
    main()
