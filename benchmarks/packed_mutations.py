"""Damaged packed files: does one crash, hang or fill the reader, or give other weights?

    python benchmarks/packed_mutations.py [--files 10000] [--seed 7] [--json]

Packed files of every kind and layout, each with one to six changes: bits and bytes flipped, cut
out, doubled, numbers set to extremes, the end cut off. For four in ten of them the checksums are
then made right again, as somebody would who means harm; of a quarter of all files the table is
changed word by word.

Wrong is: anything raised but a refusal that names the file; a file with a damage that its checksums
see which is read all the same; more than 10 s or 512 MiB for one file. A crash ends the process.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from head import parser_of, print_json
from torch import nn

from plinth.engine import ModelError
from plinth.engine.compression import coding, packing
from plinth.engine.compression.packing import Coded, PackedFile
from plinth.engine.compression.registry import Recipe
from plinth.engine.compression.training import compress
from plinth.engine.models.weights import fill

SECONDS, MORE_BYTES = 10.0, 512 << 20
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    2,
    3,
    255,
    4096,
    1 << 31,
    (1 << 48) - 1,
    1 << 60,
    -1,
    1.5,
    True,
    None,
    [],
    "x",
)


@dataclass
class Outcome:
    """What became of the files.

    Args:
        files: how many were read; ``refused``: of them; ``equal``: gave the very weights.
        other: gave other weights, with checksums made right again, which nobody can see.
        wrong: what must not happen.
        slowest: seconds of one file; ``peak_bytes``: more than at the start.
        reasons: how often each kind of reason was given.
    """

    files: int = 0
    refused: int = 0
    equal: int = 0
    other: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def network() -> nn.Module:
    """A small network as its code builds it."""
    return nn.Sequential(
        *(nn.Conv1d(4, 24, 3, padding=1), nn.BatchNorm1d(24), nn.ReLU()),
        *(nn.Conv1d(24, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 8, 40)),
    )


NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "low rank": {"low_rank": {"energy": 0.6}, "quantization_aware": {"bits": "int4"}},
    "fewer channels": {"pruning": {"channels": 0.5}, "quantization_aware": {"bits": "int8"}},
    "even steps": {"quantization_aware": {"bits": "even", "feedback": True}},
}
"""Recipes of the files that are read into :func:`network`, whose layers some change."""


def originals(folder: Path) -> dict[str, bytes]:
    """Packed files, each with tensors of several kinds, by name."""
    made: dict[str, bytes] = {}
    for name, high, keep, shape in (
        ("ternary", 1, 0.2, (32, 16, 3, 3)),
        ("int4", 7, 0.4, (48, 200)),
        ("int8", 127, 1.0, (64, 96)),
        ("dense ternary", 1, 1.0, (20, 30)),
    ):
        noise = torch.Generator().manual_seed(len(made))
        codes = torch.randint(-high, high + 1, shape, generator=noise)
        codes *= torch.rand(shape, generator=noise) < keep
        path = folder / "whole.packed"
        packing.write(
            path,
            {
                "weight": Coded(codes.to(torch.int8), torch.rand(shape[0], generator=noise).half()),
                "across": Coded(codes[:8].to(torch.int8), torch.ones(shape[1]).half(), axis=1),
                "bias": torch.randn(shape[0], generator=noise),
                "halves": torch.randn(5000, generator=noise).half().float(),
                "seen": torch.tensor(7),
                "mask": torch.rand(40, generator=noise) > 0.5,
                "ramp": torch.arange(3000),
            },
            {"tied": "weight"},
        )
        made[name] = path.read_bytes()
    torch.manual_seed(0)
    rows = {"x": torch.randn(8, 4, 8)}
    for name, steps in NETWORKS.items():
        small = compress(
            network().eval(),
            rows,
            Recipe(steps, epochs=0),
            lambda net, given: {"y": net(given["x"])},
        )
        small.write(folder / "whole.packed")
        made[name] = (folder / "whole.packed").read_bytes()
    return made


def mutated(chance: random.Random, whole: bytes) -> tuple[bytes, bool]:
    """A damaged file, and whether its checksums were made right again."""
    if chance.random() < 0.25:
        return _retabled(chance, whole), True
    content = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        _change(chance, content)
    if chance.random() < 0.1:
        del content[chance.randrange(len(content) + 1) :]
    repaired = chance.random() < 0.4
    return (_repaired(bytes(content)) if repaired else bytes(content)), repaired


def _change(chance: random.Random, content: bytearray) -> None:
    near = chance.random() < 0.4
    at = chance.randrange(min(40, len(content)) if near else len(content))
    how = chance.randrange(5)
    if how == 0:
        content[at] ^= 1 << chance.randrange(8)
    elif how == 1:
        content[at] = chance.randrange(256)
    elif how == 2:
        value = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
        content[at : at + 4] = value
    elif how == 3 and len(content) > 100:
        del content[at : at + chance.choice((1, 2, 4, 40))]
    else:
        content[at:at] = content[at : at + chance.choice((1, 2, 8, 100))]


def _parts(whole: bytes) -> tuple[list[Any], bytes, bytes]:
    """Table, small tensors, and what lies behind the head."""
    size = int.from_bytes(whole[12:16], "little")
    head = coding.unsqueeze(whole[20 : 20 + size], packing.MAX_HEAD_BYTES, at_most=True)
    end = 4 + int.from_bytes(head[:4], "little")
    return json.loads(head[4:end]), head[end:], whole[20 + size :]


def _joined(table: Any, inside: bytes, behind: bytes) -> bytes:
    said = json.dumps(table, separators=(",", ":")).encode()
    head = coding.squeeze(len(said).to_bytes(4, "little") + said + inside)
    start = packing.MAGIC + bytes((packing.VERSION, 0, 0, 0))
    return (
        start
        + len(head).to_bytes(4, "little")
        + zlib.crc32(head).to_bytes(4, "little")
        + (head + behind)
    )


def _repaired(content: bytes) -> bytes:
    """The same with right checksums, of the head and of each tensor, as far as it can be read."""
    try:
        size = int.from_bytes(content[12:16], "little")
        crc = zlib.crc32(content[20 : 20 + size]).to_bytes(4, "little")
        content = content[:16] + crc + content[20:]
        table, inside, behind = _parts(content)
    except (ValueError, IndexError, MemoryError):
        return content
    at, out = 0, 20 + size
    for line in table:
        if line[3] == "coded":
            at += 2 * line[2][line[7]]
        if line[4].endswith(">"):
            line[6], at = zlib.crc32(inside[at : at + line[5]]), at + line[5]
        elif line[3] != "same":
            out += -out % 64 if line[5] >= 4096 else 0
            line[6], out = zlib.crc32(content[out : out + line[5]]), out + line[5]
    return _joined(table, inside, behind)


def _retabled(chance: random.Random, whole: bytes) -> bytes:
    """One word of the table, a shape, a layout or a name is another; tensors may be too."""
    table, inside, behind = _parts(whole)
    line = chance.choice(table)
    at = chance.randrange(8)
    if at == 2 and line[2]:
        line[2][chance.randrange(len(line[2]))] = chance.choice(NUMBERS)
    elif at in (3, 4):
        line[at] = chance.choice((*coding.LAYOUTS, "plain", "half", "same", "zstd", "flat", "raw>"))
    else:
        line[at] = chance.choice(NUMBERS)
    if chance.random() < 0.2:
        table.append(chance.choice(table))
    if chance.random() < 0.3:
        hit = bytearray(inside or b"\0")
        hit[chance.randrange(len(hit))] ^= 0xFF
        inside = bytes(hit)
    return _joined(table, inside, behind)


def read_all(path: Path, name: str) -> dict[str, bytes]:
    """Every tensor of a file, as it is loaded into a module."""
    if name in NETWORKS:
        module = network()
        fill(module, path, str(path), {})
        return {
            key: value.numpy(force=True).tobytes() for key, value in module.state_dict().items()
        }
    with PackedFile(path) as file:
        return {name: file.dense(name).numpy().tobytes() for name in file.entries}


def run(files: int, seed: int, folder: Path) -> Outcome:
    """Damage so many files and read each."""
    chance, found = random.Random(seed), Outcome()
    made = originals(folder)
    want = {}
    for name, content in made.items():
        (folder / "whole.packed").write_bytes(content)
        want[name] = read_all(folder / "whole.packed", name)
    path = folder / "damaged.packed"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(files):
        name = chance.choice(list(made))
        content, repaired = mutated(chance, made[name])
        path.write_bytes(content)
        begun = time.process_time()
        where = f"file {number} ({name}, seed {seed})"
        try:
            got = read_all(path, name)
        except ModelError as error:
            found.refused += 1
            found.reasons[_kind(str(error))] += 1
            if str(path) not in str(error):
                found.wrong.append(f"{where}: the refusal does not name the file: {error}")
        except Exception as error:  # noqa: BLE001 - whatever is not a refusal is what is looked for
            found.wrong.append(f"{where}: {type(error).__name__}: {error}")
        else:
            same = got == want[name]
            found.equal += same
            found.other += not same
            if not same and not repaired:
                found.wrong.append(f"{where}: read with other weights")
        seconds = time.process_time() - begun
        found.slowest = max(found.slowest, seconds)
        if seconds > SECONDS:
            found.wrong.append(f"{where}: took {seconds:.1f} s")
        found.files += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found.peak_bytes = (peak - before) * 1024
    if found.peak_bytes > MORE_BYTES:
        found.wrong.append(f"{found.peak_bytes} bytes more than at the start")
    return found


def _kind(reason: str) -> str:
    words = [word for word in reason.partition(": ")[2].split() if word.isalpha()]
    return " ".join(words[:6])


def main() -> int:
    """Run and print; 1 if anything was wrong."""
    parser = parser_of(__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.files, given.seed, Path(folder))
    if given.json:
        print_json(asdict(found))
    else:
        print(
            f"{found.files} files: {found.refused} refused, {found.equal} equal, {found.other} "
            f"other weights under right checksums, {len(found.wrong)} wrong; slowest "
            f"{found.slowest:.3f} s, {found.peak_bytes / 1e6:.0f} MB more at the peak"
        )
        for reason, count in found.reasons.most_common(12):
            print(f"  {count:6} {reason}")
        for line in found.wrong[:20]:
            print(f"WRONG {line}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
