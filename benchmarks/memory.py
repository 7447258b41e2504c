"""Memory in fresh processes: what is planned against what is measured, and what it takes to fit.

    python benchmarks/memory.py plan [--backends eager onnxruntime openvino] [--json]
    python benchmarks/memory.py texts [--runs 3] [--models bert gpt2] [--ways naive ...] [--json]
    python benchmarks/memory.py times [--runs 3] [--most 90] [--models bert gpt2] [--json]
    python benchmarks/memory.py idle [--backends eager] [--seconds 20] [--rate 40] [--json]
    python benchmarks/memory.py volumes [--networks unet encoder] [--ways whole ...] [--json]

Each line is printed when it is there. With ``--folder`` what a line needs of those before it stays
there, so that each can be had by a command of its own: ``texts --models gpt2 --ways streamed``.

Every figure is of a process of its own: the largest memory it had (sampled every millisecond and
held against the kernel's own peak), less what it had after its imports. *Dirty* bytes are those
that the system could only write to swap; the rest are pages of files, which it may drop.

``plan``: bytes that the engine's plan says for one batch, with the weights, against those measured.
``texts``: BERT-base on 8 x 256 tokens and GPT-2 Medium on 4 x 256, random weights through
transformers: as transformers runs them with and without autograd, and by the engine, whole and in
a memory budget smaller than the weights, which streams them layer by layer; answers are compared.
``times``: the CPU seconds of the same, but for naive, in one process by turns.
``idle``: 20 models in a budget of 5, called at random in an open loop, against all in memory.
``volumes``: a 3-D U-Net on 256^3 voxels: layer after layer, a few planes at a time by the engine,
and by windows with a halo; an encoder of CT with
117 million weights (a ResNet-152 inflated to three dimensions, its weights random) on
160 x 224 x 224 voxels, as it is and in a budget of 1 GB.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from head import parser_of, print_json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plinth.engine import (
    Call,
    Engine,
    Model,
    ModelSpec,
    ModelStore,
    Sla,
    TensorSpec,
    Tiling,
    architecture,
)
from plinth.engine.backends import choice
from plinth.engine.mapped import trim
from plinth.engine.models.families import find
from plinth.engine.models.families import volumes as family
from plinth.engine.runtime import loaded_model

TEXTS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "bert": ({}, (8, 256)),
    "gpt2": ({"width": 1024, "depth": 24, "heads": 16}, (4, 256)),
}
WAYS = ("naive", "inference_mode", "engine", "streamed")
VOLUME_WAYS = ("whole", "planes", "windows", "streamed")
PLANNED: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "resnet": ({}, (3, 224, 224), 8),
    "unet3d": ({"widths": [8, 16, 32]}, (1, 64, 64, 64), 2),
    "gated-mlp": ({"features": 512, "width": 2048, "depth": 4}, (512,), 128),
}
"""Config, sizes of a row and rows; with free sizes there is no plan to hold against."""


# -- measuring ---------------------------------------------------------------------------------
def status(*fields: str) -> list[int]:
    """Bytes that the kernel counts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line for line in lines}
    return [int(found[field].split()[1]) * 1024 for field in fields]


@dataclass(slots=True)
class Peak:
    """Largest bytes above the start: all, and the dirty ones."""

    whole: int = 0
    dirty: int = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """The peaks of a block."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    found, over = Peak(), threading.Event()
    base, base_dirty = status("VmRSS", "RssAnon")

    def look() -> None:
        while not over.wait(0.001):
            found.dirty = max(found.dirty, status("RssAnon")[0] - base_dirty)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        (most,) = status("VmHWM")
        found.whole = max(most - base, found.dirty)


def fresh(*words: str) -> Any:
    """What a process of its own prints for these arguments, from JSON."""
    called = [sys.executable, __file__, "--inside", *words]
    done = subprocess.run(called, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed, as said above")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def folder_of(options: Namespace) -> Iterator[Path]:
    """The folder that stays, or one for this run."""
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        yield options.folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- plan --------------------------------------------------------------------------------------
def plan(options: Namespace) -> Iterator[dict[str, Any]]:
    """A line for each model and backend."""
    with folder_of(options) as folder:
        os.environ["PLINTH_CACHE"] = f"{folder}/cache"  # the first start exports and compiles
        store = ModelStore(folder)
        for name in options.planned:
            config, shape, _ = PLANNED[name]
            if not (folder / name).exists():
                model = sized(name, config, shape)
                store.save(model.spec, model.module)
            for backend in options.backends:
                yield fresh("plan", str(folder), name, backend)


def sized(name: str, config: Mapping[str, Any], shape: tuple[int, ...]) -> Model:
    """A model of a family whose rows have one size."""
    model = find(name).model(config, name=name)
    (given,), (made,) = model.spec.inputs, model.spec.outputs
    sizes = (made.shape[0], *shape[1:])[: len(made.shape)]
    fixed = {
        "inputs": (given.model_copy(update={"shape": shape}),),
        "outputs": (made.model_copy(update={"shape": sizes}),),
    }
    return replace(model, spec=model.spec.model_copy(update=fixed), example=None)


def plan_inside(folder: str, name: str, backend: str) -> dict[str, Any]:
    """The plan of one model on one backend, and what it takes."""
    _, shape, rows = PLANNED[name]
    store = ModelStore(Path(folder))
    # Whatever else the machine does, rows are tried, and more than one.
    choice.CHECK_SECONDS = loaded_model._SAMPLE_SECONDS = 3600.0
    with Engine(backend=backend, threads=1) as engine:
        config = find(name).small
        shape = (config.get("features", shape[0]), *shape[1:])
        small = sized(name, config, shape)
        engine.add(small, batch_range=(1, rows))  # what a library loads is no model's
        engine.remove(name)
        gc.collect()
        trim()
        base, base_dirty = status("VmRSS", "RssAnon")
        with peak() as adding:
            engine.add(store.load(name), batch_range=(1, rows))
        loaded = next(each for each in engine._models.all() if each.spec.name == name)
        given = loaded.model.rows(rows)
        gc.collect()
        trim()
        with peak() as running:
            before = status("VmRSS", "RssAnon")
            for _ in range(3):
                loaded.run(dict(given))
        whole, dirty = before[0] + running.whole, before[1] + running.dirty
    assert loaded.plan is not None
    planned = loaded.plan.peak(rows)
    moved = sum(tensor.nbytes for tensor in given.values())
    return {
        "model": name,
        "backend": backend,
        "rows": rows,
        "planned": planned,
        "measured": whole - base + moved,
        "dirty": dirty - base_dirty,
        "adding": adding.dirty,
        "off": planned / (whole - base + moved) - 1,
    }


# -- texts -------------------------------------------------------------------------------------
def texts(options: Namespace) -> Iterator[dict[str, Any]]:
    """A line for each model and way to run it."""
    with folder_of(options) as whole:
        for name in options.models:
            folder = with_weights(whole, name)
            for way in [way for way in WAYS if way in options.ways]:
                runs = [fresh("text", folder, name, way) for _ in range(options.runs)]
                line = {key: median(run[key] for run in runs) for key in runs[0]}
                yield {"model": name, "way": way, **line}


def times(options: Namespace) -> Iterator[dict[str, Any]]:
    """A line for each model and way to run it."""
    with folder_of(options) as whole:
        for name in options.models:
            words = (name, str(options.runs), str(options.most))
            yield from fresh("times", with_weights(whole, name), *words)


def with_weights(whole: Path, name: str) -> str:
    """The folder of a model's weights, made where it is not there."""
    folder = whole / name
    if not (folder / "store").exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh("weights", str(folder), name)
    return str(folder)


def theirs(name: str) -> Any:
    """The model of transformers, as small as it can be made to run."""
    import transformers as t

    if name == "bert":
        return t.BertModel(t.BertConfig(attn_implementation="eager"))
    config = t.GPT2Config(n_embd=1024, n_layer=24, n_head=16, attn_implementation="eager")
    return t.GPT2LMHeadModel(config)


def ours(name: str) -> Model:
    """The same of the engine's families."""
    return find(name).model(TEXTS[name][0], name=name)


def weights_inside(folder: str, name: str) -> dict[str, Any]:
    """Random weights of transformers, and the same as a model of a store."""
    torch.manual_seed(0)
    module = theirs(name).eval()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    save_file(state, Path(folder) / "theirs.safetensors")
    model = ours(name)
    copied(model.module, module, name)
    ModelStore(Path(folder) / "store").save(model.spec, model.module)
    return {}


def copied(mine: torch.nn.Module, module: torch.nn.Module, name: str) -> None:
    """Weights of transformers into a family's module."""
    found, width = dict(module.state_dict()), mine.words.weight.shape[1]  # type: ignore[union-attr, index]
    if name == "gpt2":
        found = {key: v.T if v.ndim == 2 and ".h." in key else v for key, v in found.items()}
        top = {"transformer.wte": "words", "transformer.wpe": "positions", "lm_head": "head"}
        top["transformer.ln_f"] = "norm"
        parts = {"attn.c_proj": "attention.out", "mlp.c_fc": "up", "mlp.c_proj": "down"}
        parts |= {"ln_1": "norm_1", "ln_2": "norm_2"}
        block = "transformer.h.{}."
        keys: tuple[str, ...] = ("query", "key", "value")
    else:
        top = {"embeddings.word_embeddings": "words", "embeddings.LayerNorm": "norm"}
        top |= {"embeddings.position_embeddings": "positions", "pooler.dense": "pooler"}
        top["embeddings.token_type_embeddings"] = "segments"
        parts = {f"attention.self.{key}": f"attention.{key}" for key in ("query", "key", "value")}
        parts |= {"attention.output.dense": "attention.out", "intermediate.dense": "up"}
        parts |= {"attention.output.LayerNorm": "norm_1", "output.LayerNorm": "norm_2"}
        parts["output.dense"] = "down"
        block, keys = "encoder.layer.{}.", ()
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        state |= {
            f"{b}.{kind}": found[f"{a}.{kind}"] for a, b in top.items() if f"{a}.{kind}" in found
        }
        for number in range(len(mine.blocks)):  # type: ignore[arg-type]
            at = block.format(number)
            state |= {
                f"blocks.{number}.{b}.{kind}": found[f"{at}{a}.{kind}"] for a, b in parts.items()
            }
            for index, key in enumerate(keys):
                span = slice(index * width, (index + 1) * width)
                state[f"blocks.{number}.attention.{key}.{kind}"] = found[f"{at}attn.c_attn.{kind}"][
                    span
                ]
    mine.load_state_dict(state)


def ids_of(name: str) -> dict[str, Tensor]:
    """Tokens without padding."""
    vocabulary = 30_000
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, TEXTS[name][1], generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_inside(folder: str, name: str, way: str) -> dict[str, Any]:
    """Peaks, CPU seconds and the cosine of the answer to the naive one."""
    torch.set_num_threads(1)
    if way in ("naive", "inference_mode"):
        import transformers  # noqa: F401 - what is imported is no model's
    with peak() as found, ready(Path(folder), name, way) as run:
        took = []
        for _ in range(2):
            output = None
            begun = time.process_time()
            output = run()
            took.append(time.process_time() - begun)
    kept = Path(folder) / "naive.npy"
    if way == "naive":
        np.save(kept, output.detach().numpy())  # type: ignore[union-attr]
    cosine = like(np.load(kept), output.detach())  # type: ignore[union-attr]
    return asdict(found) | {"seconds": took[-1], "cosine": cosine}


def like(kept: Any, output: Tensor) -> float:
    """The cosine of two answers."""
    want, got = torch.from_numpy(kept).double().reshape(-1), output.double().reshape(-1)
    return float(want @ got / (want.norm() * got.norm()))


def times_inside(folder: str, name: str, runs: str, most: str) -> list[dict[str, Any]]:
    """CPU seconds of each way in turns, after a run of each that does not count.

    Once ``most`` seconds are over no other turn begins, but for the first that counts.
    """
    torch.set_num_threads(1)
    until = time.monotonic() + float(most)
    took: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    with ExitStack() as open_:
        ways = dict[str, Callable[[], Tensor]]()
        for way in took:
            begun = time.process_time()
            ways[way] = open_.enter_context(ready(Path(folder), name, way))
            say(f"{name}, {way}: ready after {time.process_time() - begun:.0f} s of CPU")
        for turn in range(1 + int(runs)):
            if turn > 1 and time.monotonic() > until:
                break
            for way, run in ways.items():
                begun = time.process_time()
                run()
                spent = time.process_time() - begun
                say(f"{name}, {way}, turn {turn}: {spent:.1f} s of CPU")
                if turn:
                    took[way].append(spent)
    base = took["inference_mode"]
    lines = []
    for way, each in took.items():
        ratios = [one / other for one, other in zip(each, base, strict=True)]
        spread = {"least": min(ratios), "most": max(ratios)}
        lines.append({"model": name, "way": way, "seconds": median(each), "ratio": median(ratios)})
        lines[-1] |= spread
    return lines


@contextmanager
def ready(folder: Path, name: str, way: str) -> Iterator[Callable[[], Tensor]]:
    """What runs the model on its texts, a way."""
    rows = ids_of(name)
    if way in ("naive", "inference_mode"):
        module = theirs(name).eval()
        module.load_state_dict(load_file(folder / "theirs.safetensors"))

        def theirs_run() -> Tensor:
            with torch.inference_mode(way != "naive"):
                found = module(**rows)
            answer: Tensor = found.logits[:, -1] if name == "gpt2" else found.last_hidden_state
            return answer

        yield theirs_run
        return
    choice.CHECK_SECONDS = 3600.0  # whatever else the machine does, rows are tried
    budget = 200 << 20 if way == "streamed" else 8 << 30
    with Engine(backend="eager", precision="fp32", threads=1, memory_budget=budget) as engine:
        most = len(rows["input_ids"])
        engine.add(ModelStore(folder / "store").load(name), batch_range=(1, most), example=rows)
        streams = engine.status()["models"][name]["memory"]
        assert (streams is not None) == (way == "streamed"), streams

        def run() -> Tensor:
            found: Any = engine.submit(Call(name, rows)).result(600).value
            answer: Tensor = found[:, -1] if name == "gpt2" else found["tokens"]
            return answer

        yield run


# -- idle --------------------------------------------------------------------------------------
def idle(options: Namespace) -> Iterator[dict[str, Any]]:
    """A line for each way to hold 20 models."""
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(Path(folder))
        for number in range(20):
            model = find("gated-mlp").model(
                {"features": 256, "width": 1024, "depth": 4}, name=f"m{number}", seed=number
            )
            store.save(model.spec, model.module)
        words = (str(options.seconds), str(options.rate))
        os.environ["PLINTH_CACHE"] = f"{folder}/cache"
        for backend in options.backends:
            for held in ("all", "five"):
                yield fresh("idle", folder, backend, held, *words)


def answered(took: list[float], due: float, _: object) -> None:
    """Keep how long after it was due a call was over."""
    took.append(time.perf_counter() - due)


def idle_inside(folder: str, backend: str, held: str, seconds: str, rate: str) -> dict[str, Any]:
    """20 models called at random: how many were answered, and how late."""
    store, choose = ModelStore(Path(folder)), np.random.default_rng(0)
    one = sum(t.nbytes for t in store.load("m0").module.state_dict().values())
    budget = 5 * one + (16 << 20) if held == "five" else 4 << 30
    engine = Engine(backend=backend, threads=1, memory_budget=budget, evict_idle=held == "five")
    with peak() as found, engine:
        for number in range(20):
            engine.add(store.load(f"m{number}"), batch_range=(1, 8))
        gc.collect()
        (loaded,) = status("VmRSS")
        took: list[float] = []
        failed = 0
        calls: list[Future[Any]] = []
        begun = time.perf_counter()
        for turn in range(int(float(seconds) * float(rate))):
            due = begun + turn / float(rate)
            time.sleep(max(0.0, due - time.perf_counter()))
            name = f"m{min(19, int(choose.exponential(6.0)))}"
            rows = torch.randn(1, 256)
            future = engine.submit(Call(name, rows), Sla(deadline_ms=None))
            future.add_done_callback(partial(answered, took, due))
            calls.append(future)
        for future in calls:
            failed += future.exception(60) is not None
        models = engine.status()["models"].values()
        returns = sum(each.get("returns", 0) for each in models)
    return {
        "backend": backend,
        "held": held,
        "budget": budget,
        "weights": 20 * one,
        "calls": len(calls),
        "answered": len(calls) - failed,
        "returns": returns,
        "p50_ms": 1e3 * float(np.quantile(took, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(took, 0.99)),
        "loaded": loaded,
        **asdict(found),
    }


# -- volumes -----------------------------------------------------------------------------------
class Bottleneck3d(nn.Module):
    """Three convolutions beside a shortcut (He et al., 2015), in three dimensions."""

    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inside, width, 1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, 4 * width, 1, bias=False),
            nn.BatchNorm3d(4 * width),
        )
        self.short = None
        if stride > 1 or inside != 4 * width:
            self.short = nn.Sequential(
                nn.Conv3d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm3d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, z, y, x) to (n, 4 * width, ...)."""
        found: Tensor = self.body(x)
        return found.add_(x if self.short is None else self.short(x)).relu_()


class Encoder3d(nn.Module):
    """A ResNet-152 inflated to three dimensions: (n, 1, z, y, x) to (n, 2048) features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(),
            nn.MaxPool3d(3, 2, 1),
        )
        blocks, inside = [], 64
        for width, depth, stride in ((64, 3, 1), (128, 8, 2), (256, 36, 2), (512, 3, 2)):
            for number in range(depth):
                blocks.append(Bottleneck3d(inside, width, 1 if number else stride))
                inside = 4 * width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, volume: Tensor) -> Tensor:
        """Features: the mean over all places."""
        found: Tensor = self.blocks(self.stem(volume.expand(-1, 3, -1, -1, -1))).mean((2, 3, 4))
        return found


@architecture("ct-encoder-152")
def encoder() -> nn.Module:
    """The encoder, in random weights."""
    torch.manual_seed(0)
    return Encoder3d()


def volumes(options: Namespace) -> Iterator[dict[str, Any]]:
    """A line for each network and way."""
    with folder_of(options) as whole:
        folder = str(whole)
        for way in VOLUME_WAYS:
            if way not in options.ways:
                continue
            if "unet" in options.networks and way != "streamed":
                yield fresh("volume", folder, way)
            if "encoder" in options.networks and way in ("whole", "streamed"):
                if not (whole / "store").exists():
                    fresh("encoder", folder, "save")
                yield fresh("encoder", folder, way)


def encoder_inside(folder: str, way: str) -> dict[str, Any]:
    """Peaks of the encoder on one CT."""
    torch.set_num_threads(1)
    store = ModelStore(Path(folder) / "store")
    x, y = TensorSpec(name="volume", shape=(1, 160, 224, 224)), TensorSpec(name="y", shape=(2048,))
    spec = ModelSpec(name="encoder", architecture="ct-encoder-152", inputs=(x,), outputs=(y,))
    if way == "save":
        store.save(spec, encoder().eval())
        return {}
    rows = torch.rand(1, 1, 160, 224, 224, generator=torch.Generator().manual_seed(2))
    with peak() as found:
        if way == "whole":
            module = encoder().eval()
            begun = time.process_time()
            with torch.inference_mode():
                output = module(rows)
            seconds = time.process_time() - begun
        else:
            budget = 1_000_000_000
            with Engine(backend="eager", threads=1, memory_budget=budget) as engine:
                engine.add(store.load("encoder"), batch_range=(1, 1))
                streams = engine.status()["models"]["encoder"]["memory"]
                begun = time.process_time()
                output = tensor_of(engine.submit(Call("encoder", rows)).result(3600).value)
                seconds = time.process_time() - begun
            assert streams is not None
    kept = Path(folder) / "encoder.npy"
    if way == "whole":
        np.save(kept, output.numpy())
    want = torch.from_numpy(np.load(kept))
    cosine = float(torch.nn.functional.cosine_similarity(want, output).min())
    return {"way": f"encoder {way}", **asdict(found), "seconds": seconds, "cosine": cosine}


def tensor_of(value: Any) -> Tensor:
    """The answer of a model with one output."""
    assert isinstance(value, Tensor)
    return value


def volume_inside(folder: str, way: str) -> dict[str, Any]:
    """Peaks of a 3-D U-Net on 256^3 voxels, its labels against those of a whole pass."""
    torch.set_num_threads(1)
    model = find("unet3d").model({"widths": [8, 16, 32]}, name="unet", seed=3)
    volume = torch.randn(1, 256, 256, 256, generator=torch.Generator().manual_seed(2))
    kept = Path(folder) / "labels.npy"
    with peak() as found:
        begun = time.process_time()
        if way == "whole":  # one layer after the other
            family.LARGE = sys.maxsize
            labels = model.run({"volume": volume[None]})["logits"][0].argmax(0).byte()
        elif way == "planes":
            with Engine(backend="eager", threads=1) as engine:
                engine.add(model, batch_range=(1, 1))
                logits = tensor_of(engine.submit(Call("unet", volume[None])).result(3600).value)
            labels = logits[0].argmax(0).byte()
        else:
            tiling = Tiling((128, 152, 152), halo=(24, 24, 24), reduce="argmax")
            with Engine(backend="eager", threads=1) as engine:
                engine.add(model, batch_range=(1, 1))
                labels = tensor_of(engine.submit(Call("unet", volume, tiling)).result(3600).value)
        seconds = time.process_time() - begun
    if way == "whole":
        np.save(kept, labels.numpy())
    same = float((torch.from_numpy(np.load(kept)) == labels).double().mean())
    return {"way": way, **asdict(found), "seconds": seconds, "same_labels": same}


def say(progress: str) -> None:
    """How far it is, beside what is printed."""
    print(progress, file=sys.stderr, flush=True)


def shown(line: dict[str, Any]) -> None:
    """A line; bytes as MB."""
    cells = []
    for key, value in line.items():
        if (isinstance(value, int) and value > 1 << 16) or key in ("whole", "dirty"):
            cells.append(f"{key} {value / 1e6:.0f} MB")
        else:
            cells.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        inside = {
            "plan": plan_inside,
            "weights": weights_inside,
            "text": text_inside,
            "times": times_inside,
            "idle": idle_inside,
            "volume": volume_inside,
            "encoder": encoder_inside,
        }
        print(json.dumps(inside[sys.argv[2]](*sys.argv[3:])))  # type: ignore[operator]
        return
    kinds = {"plan": plan, "texts": texts, "times": times, "idle": idle, "volumes": volumes}
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=tuple(kinds))
    parser.add_argument("--backends", nargs="+", default=["eager", "onnxruntime", "openvino"])
    parser.add_argument("--planned", nargs="+", default=list(PLANNED), choices=list(PLANNED))
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    networks, ways = ("unet", "encoder"), tuple(dict.fromkeys((*WAYS, *VOLUME_WAYS)))
    parser.add_argument("--networks", nargs="+", default=list(networks), choices=networks)
    parser.add_argument("--ways", nargs="+", default=list(ways), choices=ways)
    parser.add_argument("--folder", type=Path, help="what lines need of others stays there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--most", type=float, default=90.0, help="seconds for a model's times")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=40.0)
    options = parser.parse_args()
    lines = []
    for line in kinds[options.what](options):
        lines.append(line)
        if not options.json:
            shown(line)
    if options.json:
        print_json(lines)


if __name__ == "__main__":
    main()
