"""What the engine does on an accelerator: how models run, what a call adds, a mixed scene.

    python benchmarks/accelerator.py [--parts models calls firsts scene] [--seconds 5] [--json]

``models``: milliseconds of one forward, rows and outputs on the device, the median of runs timed by
its events; how far outputs are off those of eager float32 without TF32. ``calls``: microseconds of
the MLP from rows on the host to outputs on the host, bare and through ``Engine.run``. ``firsts``:
milliseconds of the first forward of so many rows and of the median of the next ones, in the thread
that made the model ready and then in another one; and of taking pinned memory. ``scene``:
payments of one row, due in 50 ms, at a fixed rate on an open loop, beside a 3D network that always
has work; latencies count from the scheduled arrival. Weights are random: they show speed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from compute import built
from head import parser_of, print_json
from torch import Tensor
from torch.nn import functional as F

from plinth.engine import Call, Engine, Flow, Model, PlinthError, Sla
from plinth.engine.backends import Executable, prepare
from plinth.engine.backends.choice import difference
from plinth.engine.devices.device import Device, pick
from plinth.engine.lanes.local import LocalLane
from plinth.engine.runtime.graphs import Graphed
from plinth.pipelines.interpreter import set_for_serving

NAMES = {
    "MLP 64-256x3-1": (1, 8, 32, 128),
    "GRU 32-64, 20 steps": (1, 8, 32, 128),
    "BERT-base, 128 tokens": (1, 8, 32, 128),
    "ResNet-50": (1, 8, 32, 128),
    "3D U-Net, 64x128x128": (1, 4),
}
WAYS = (
    *("eager fp32", "eager fp32 TF32", "eager bf16", "eager fp16"),
    *("graphs fp32", "graphs bf16", "graphs fp16"),
    *("inductor fp32", "inductor bf16", "inductor bf16 graphs"),
)
DUE = Sla(deadline_ms=50)


@dataclass
class Line:
    """One way of running a model: milliseconds of so many rows, and what they lose."""

    model: str
    rows: int
    way: str
    ms: float = 0.0
    off: float = 0.0
    cosine: float = 1.0
    reason: str = ""


@contextmanager
def tf32(on: bool) -> Any:
    """Let float32 multiply in TF32, or not."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        if on:
            with tf32(False):
                pass


def forward_ms(device: Device, run: Callable[[Mapping[str, Tensor]], object], rows: Any) -> float:
    """Milliseconds of one forward by the device's events, the median of about 0.15 s."""
    taken: list[float] = []
    until = time.perf_counter() + 0.15
    stream = device.stream()
    with stream:
        for _ in range(3):
            run(rows)
        device.synchronize()
        while len(taken) < 5 or (time.perf_counter() < until and len(taken) < 100):
            begun, ended = device.event(), device.event()
            begun.record(stream)
            run(rows)
            ended.record(stream)
            ended.synchronize()
            taken.append(begun.elapsed_time(ended))
    return median(taken)


def made(model: Model, device: Device, way: str, counts: tuple[int, ...]) -> Executable:
    """A model made ready in one way."""
    kind, precision, *_ = way.split()
    backend = "inductor" if kind == "inductor" else "eager"
    executable = prepare(model, device, precision, backend, rows=8)
    if "graphs" in way:
        graphed = Graphed(executable)
        graphed.capture(model.rows, max(counts), 8 << 30)
        return graphed
    return executable


def models(device: Device, names: list[str], ways: list[str], until: float) -> list[Line]:
    """Every way of every model; none is begun after ``until`` (perf_counter seconds)."""
    lines = []
    for name in names:
        model, output = built(name), None
        wanted: dict[int, Tensor] = {}
        for way in ways:
            if time.perf_counter() > until:
                print(f"{name}, {way}: no time left", flush=True)
                continue
            with tf32("TF32" in way):
                found = measured(model, device, name, way, wanted)
            for line in found:
                print(row_of(line), flush=True)
            lines += found
        del model, output, wanted
        device.give_back_memory()
    return lines


def measured(
    model: Model, device: Device, name: str, way: str, wanted: dict[int, Tensor]
) -> list[Line]:
    """One way of one model at all its numbers of rows; what cannot run says why."""
    counts, output = NAMES[name], model.spec.outputs[0].name
    try:
        executable = made(model, device, way, counts)
    except PlinthError as error:
        return [Line(name, 0, way, reason=error.message)]
    lines = []
    for count in counts:
        line = Line(name, count, way)
        rows = {key: each.to(device.torch) for key, each in model.rows(count).items()}
        got = executable.run(rows)[output].float().cpu()
        want = wanted.setdefault(count, got)  # the first way is the reference
        line.off = difference(got, want)
        line.cosine = float(F.cosine_similarity(got.flatten(1), want.flatten(1)).mean())
        line.ms = forward_ms(device, executable.run, rows)
        lines.append(line)
    if "graphs" in way:
        lines[-1].reason = str(executable.report["graphs"])
    return lines


def row_of(line: Line) -> str:
    """A row of the table in Markdown."""
    if not line.ms:
        return f"| {line.model} | - | {line.way} | {line.reason} | | |"
    return (
        f"| {line.model} | {line.rows} | {line.way} | {line.ms:.3f} | {line.off:.1g} | "
        f"{line.cosine:.6f} | {line.reason}"
    )


# -- what a call adds --------------------------------------------------------------------------
def ask(name: str, rows: Tensor) -> Flow[Tensor]:
    """One call."""
    value = yield Call(name, rows)
    assert isinstance(value, Tensor)
    return value


def each_us(call: Callable[[], object], times: int = 150) -> float:
    """Microseconds of one call, the median of five rounds."""
    rounds = []
    for _ in range(6):
        begun = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - begun) / times * 1e6)
    return median(rounds[1:])


def _bare(executable: Executable, x: Tensor) -> Tensor:
    return executable.run({"x": x})["y"].cpu()


def _asked(engine: Engine, x: Tensor) -> Tensor:
    return engine.run(ask("net", x)).value


def calls(device: Device) -> list[dict[str, Any]]:
    """The MLP from host to host: bare, and through an engine of each depth, graphs on and off."""
    model = built("MLP 64-256x3-1")
    bare = prepare(model, device, "fp32", "eager")
    found = []
    for rows in (1, 16, 128):
        x = model.rows(rows)["x"]
        us = {"bare": each_us(partial(_bare, bare, x))}
        for depth, graphs in ((1, False), (2, False), (1, True), (2, True)):
            with Engine(device=str(device), pipeline_depth=depth, graphs=graphs) as engine:
                engine.add(model)
                name = f"depth {depth}{', graphs' if graphs else ''}"
                us[name] = each_us(partial(_asked, engine, x))
        found.append({"rows": rows, **{key: round(value, 1) for key, value in us.items()}})
        print(found[-1], flush=True)
    return found


# -- first batches -----------------------------------------------------------------------------
def firsts(device: Device) -> list[dict[str, Any]]:
    """What the first batch of each size costs in one thread, and then in another."""
    found: list[dict[str, Any]] = []
    executable = prepare(built("3D U-Net, 64x128x128"), device, "bf16", "eager")
    model = built("3D U-Net, 64x128x128")
    inputs = {count: model.rows(count) for count in (1, 2, 3, 4)}

    def forward(count: int) -> float:
        begun = time.perf_counter()
        executable.run(inputs[count])
        device.synchronize()
        return 1e3 * (time.perf_counter() - begun)

    def measure(where: str) -> None:
        for count in inputs:
            first, later = forward(count), median(forward(count) for _ in range(5))
            found.append({"where": where, "rows": count, "first_ms": first, "later_ms": later})

    measure("one thread")
    other = threading.Thread(target=measure, args=("another thread",))
    other.start()
    other.join()
    for size in (1 << 20, 16 << 20, 64 << 20):
        begun = time.perf_counter()
        taken = device.pinned(size)
        found.append(
            {"where": "pinned", "bytes": size, "first_ms": 1e3 * (time.perf_counter() - begun)}
        )
        del taken
    for line in found:
        print(line, flush=True)
    return found


# -- a mixed scene -----------------------------------------------------------------------------
@dataclass
class Scene:
    """How payments fared beside the 3D network."""

    way: str
    rate: float
    answered: int
    in_time: float
    refused: int
    p50_ms: float
    p99_ms: float
    longest_ms: float
    windows_per_second: float
    busy: float


def busy(engine: Engine) -> float:
    """Seconds that the lanes of an engine have run batches."""
    return sum(thread.busy for thread in engine._lanes)


def renamed(model: Model, name: str) -> Model:
    """The model under another name."""
    return Model(model.spec.model_copy(update={"name": name}), model.module, example=model.example)


class Background:
    """Keeps so many calls of the 3D network with the engine."""

    def __init__(self, engine: Engine, rows: Tensor, calls: int) -> None:
        self._engine, self._rows = engine, rows
        self._stop = False
        self.done = 0
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._run) for _ in range(calls)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop:
            try:
                self._engine.run(ask("unet", self._rows), Sla())
                self.done += len(self._rows)
            except PlinthError as error:
                self.errors.append(error.message)
                return

    def end(self) -> None:
        self._stop = True
        for thread in self.threads:
            thread.join()


def scene(device: Device, way: str, rate: float, seconds: float, **options: Any) -> Scene:
    """Payments at a rate beside the 3D network; ``rate`` 0 is the network alone."""
    precision = options.pop("precision", "fp32")
    with Engine(device=str(device), **options) as engine:
        engine.add(renamed(built("MLP 64-256x3-1"), "mlp"), sla=DUE)
        unet = renamed(built("3D U-Net, 64x128x128"), "unet")
        engine.add(unet, precision=precision, batch_range=(1, 4))
        window = unet.rows(4)["x"]
        engine.run(ask("unet", window), Sla())
        background = Background(engine, window, 3)
        time.sleep(0.5)
        noise, latencies, refused, lock = random.Random(0), [], [0], threading.Lock()
        x = torch.randn(1, 64)

        def note(due: float, future: Any) -> None:
            taken = time.monotonic() - due
            with lock:
                if future.exception() is None:
                    latencies.append(taken)
                else:
                    refused[0] += 1

        windows, begun = background.done, time.monotonic()
        spent = busy(engine)
        at = begun + (noise.expovariate(rate) if rate else seconds)
        sent = []
        while at < begun + seconds:
            pause = at - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            future = engine.submit(Call("mlp", x), DUE)
            future.add_done_callback(partial(note, at))
            sent.append(future)
            at += noise.expovariate(rate)
        if not rate:
            time.sleep(seconds)
        elapsed = time.monotonic() - begun
        spent, windows = busy(engine) - spent, background.done - windows
        for future in sent:
            future.exception(30)
        background.end()
        assert not background.errors, background.errors
    latencies_ms = [1e3 * each for each in latencies]
    ms = sorted(latencies_ms) or [0.0, 0.0]
    return Scene(
        way,
        rate,
        len(latencies),
        round(sum(each <= 50 for each in latencies_ms) / max(len(sent), 1), 4),
        refused[0],
        round(median(ms), 2),
        round(quantiles(ms, n=100)[98], 2),
        round(ms[-1], 2),
        round(windows / elapsed, 1),
        round(spent / elapsed, 3),
    )


@contextmanager
def pageable() -> Any:
    """Rows are copied from ordinary memory."""
    usual = Device.pinned
    changed: Any = Device
    changed.pinned = lambda _, size: torch.empty(size, dtype=torch.uint8)
    try:
        yield
    finally:
        changed.pinned = usual


@contextmanager
def unrehearsed() -> Any:
    """Batches of a size run for the first time when somebody waits for them."""
    usual = LocalLane.rehearsals
    changed: Any = LocalLane
    changed.rehearsals = lambda *_: iter(())
    try:
        yield
    finally:
        changed.rehearsals = usual


def scenes(device: Device, seconds: float, rate: float) -> list[Scene]:
    """The scene with one thing changed at a time."""
    found = []

    def show(way: str, rate: float, depth: int = 1, graphs: bool = False, **options: Any) -> None:
        options = {"pipeline_depth": depth, "graphs": graphs, "precision": "bf16", **options}
        found.append(scene(device, way, rate, seconds, **options))
        print(found[-1], flush=True)

    show("bf16, depth 1, garbage collected as by default", rate)
    with set_for_serving():
        show("network alone, bf16, depth 1", 0)
        show("network alone, bf16, depth 2", 0, depth=2)
        with pageable():
            show("bf16, depth 1, ordinary memory", rate)
        with unrehearsed():
            show("bf16, depth 1, unrehearsed", rate)
        show("bf16, depth 1", rate)
        show("bf16, depth 2", rate, depth=2)
        show("bf16, depth 1, graphs", rate, graphs=True)
        show("bf16, depth 2, graphs", rate, depth=2, graphs=True)
        show("fp32, depth 2, graphs", rate, depth=2, graphs=True, precision="fp32")
    return found


def main() -> None:
    """Run and print."""
    parser = parser_of(__doc__)
    parts = ["models", "calls", "firsts", "scene"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of the part models")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each scene")
    parser.add_argument("--rate", type=float, default=1000.0, help="payments per second")
    given = parser.parse_args()
    device = pick("auto")
    if device.kind == "cpu":
        parser.error("there is no accelerator here")
    found: dict[str, Any] = {"device": device.name}
    if "models" in given.parts:
        until = time.perf_counter() + given.budget
        found["models"] = [asdict(e) for e in models(device, given.models, given.ways, until)]
    if "calls" in given.parts:
        with tf32(False):
            found["calls"] = calls(device)
    if "firsts" in given.parts:
        found["firsts"] = firsts(device)
    if "scene" in given.parts:
        found["scenes"] = [asdict(e) for e in scenes(device, given.seconds, given.rate)]
    if given.json:
        print_json(found)


if __name__ == "__main__":
    main()
