"""The search for the fastest way within an allowed loss, and the variants it ends in."""

import json
import math
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from plinth.engine import Call, ConfigError, Engine, InputError, Model, ModelError, ModelStore, Sla
from plinth.engine.backends import registry
from plinth.engine.backends.choice import TOLERANCE, compiled
from plinth.engine.backends.export import onnx_file
from plinth.engine.backends.quantised import NamedLayer, quantised_file, switched
from plinth.engine.devices.device import pick
from plinth.engine.optimize import search as optimize
from plinth.engine.optimize.keep import keep
from plinth.engine.optimize.measures import average_precision, loss_of, roc_auc
from plinth.engine.optimize.recipes import Goal, shrink
from plinth.engine.optimize.search import Task, alike, search
from plinth.engine.precision.policy import PrecisionPolicy, resolve

pytestmark = [pytest.mark.cpu, pytest.mark.slow]
CPU = pick("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Wide(nn.Module):
    """Layers wide enough that int8 shows, one of which int8 harms: its outliers hide the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.harmed = nn.Linear(256, 512), nn.Linear(512, 512)
        self.two, self.out = nn.Linear(512, 512), nn.Linear(512, 8)
        with torch.no_grad():
            self.one.weight[:1] *= 300
            self.harmed.weight[:, :1] *= 1e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.harmed(self.one(x)))
        return self.out(torch.relu(self.two(x)))


def by_bytes(executable, rows, repeats):
    """A clock that counts bytes of weights: int8 pays, however busy the machine is; int4 less."""
    return executable.weights * repeats * (4 if "int4" in executable.precision else 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search over a model in a store, and the variants that were kept of it."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    rows = {"x": torch.randn(48, 256, generator=torch.Generator().manual_seed(3))}
    store.add(Model.from_torch(Wide().eval(), example=rows["x"], name="wide"))
    model = store.load("wide")
    task = Task(
        model, rows, loss_of("cosine"), 2e-3, CPU, backends=("eager", "onnxruntime"), batch=24
    )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, "_cpu_seconds", by_bytes)
        result = search(task, tmp_path_factory.mktemp("work"), said.append)
    written = keep(result, task, store.variants("wide"), metric="cosine", data="noise")
    return store, task, result, written, said


def test_the_layer_that_is_harmed_most_goes_back_to_float32_first(found):
    _, _, result, _, said = found
    damage = result.damage["onnxruntime int8"]
    harmed = max(damage, key=damage.get)
    assert harmed == list(damage)[1], "the second layer"
    kept = [p for p in result.points if p.backend == "onnxruntime" and p.policy.used == {"int8"}]
    whole = next(p for p in kept if p.kept == 0)
    assert whole.loss > 2e-3
    fit = [p for p in kept if p.loss <= 2e-3]
    assert fit
    assert all(p.policy.layers[harmed] == "fp32" for p in fit)
    assert any("alone loses" in line for line in said)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_one_graph_computes_each_layer_either_way_as_a_file_of_its_own_would(found, precision):
    _, task, *_ = found
    model = replace(task.model, onnx=onnx_file(task.model))
    either = switched("onnxruntime", model, resolve({precision: ["matmul"]}), 1)
    assert len(either.layers) == 3, "the last stays float32"
    rows = {"x": task.rows["x"][:4]}
    for low in ([], either.layers[:1], either.layers[1:], either.layers):
        policy = PrecisionPolicy(layers=dict.fromkeys(low, precision))
        alone = compiled(registry.find("onnxruntime"), model, CPU, policy, 1)
        want, got = alone.run(rows), either.taking(low)(rows)
        assert all(torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-5) for name in want)
    assert switched("onnxruntime", model, resolve({"int8_static": ["matmul"]}), 1) is None


def test_when_the_time_is_over_the_best_so_far_is_found(found, tmp_path):
    _, task, *_ = found
    said: list[str] = []
    result = search(replace(task, seconds=0.0), tmp_path, said.append)
    assert result.points == []
    assert result.best is None
    assert result.refused["onnxruntime int8"] == "the 0 s of the search were over"


def test_where_runs_are_too_many_like_layers_are_tried_together():
    layers = [
        NamedLayer(f"block.{block}.{part}", "matmul", 1.0) for block in range(3) for part in "ab"
    ]
    groups = [[layer.name for layer in group] for group in alike(layers)]
    assert groups == [[f"block.{block}.{part}" for block in range(3)] for part in "ab"]


def test_the_best_is_within_the_loss_and_nothing_within_it_is_faster(found):
    _, task, result, _, _ = found
    assert result.best is not None
    assert result.best.loss <= task.max_loss
    assert result.best.speed == max(p.speed for p in result.points if p.loss <= task.max_loss)
    assert result.held_out == 24
    front = result.front
    assert all(a.speed >= b.speed and a.loss > b.loss for a, b in pairwise(front))


def test_variants_hold_the_evidence_and_the_default_is_the_best(found):
    store, task, result, written, _ = found
    variants = store.variants("wide")
    assert variants.default == written[0].name
    evidence = variants.get(written[0].name).evidence
    assert evidence.speed == result.best.speed
    assert evidence.loss <= evidence.max_loss == task.max_loss
    assert (evidence.metric, evidence.data, evidence.rows) == ("cosine", "noise", 24)
    low = [v for v in written if "int8" in v.name]
    assert all(v.evidence.flops for v in low), "the backend's own profile"
    store.verify("wide")


def test_going_back_is_the_same_step(found):
    store, _, _, written, _ = found
    variants = store.variants("wide")
    assert variants.set_default(None) == written[0].name
    assert variants.default is None
    assert variants.set_default(written[0].name) is None
    with pytest.raises(ModelError, match="there is no variant nothing"):
        variants.set_default("nothing")


def row_of(engine: Engine, rows: torch.Tensor, sla: Sla | None = None):
    def flow():
        return (yield Call("wide", rows))

    return engine.run(flow(), sla)


def test_an_engine_in_auto_serves_the_default_and_in_fp32_the_reference(found):
    store, task, _, written, _ = found
    rows = task.rows["x"][:4]
    with Engine(device="cpu") as engine:
        engine.add(store.load("wide"), backend="auto", precision="auto")
        answer = row_of(engine, rows)
        assert answer.precision["wide"].endswith(f"/{written[0].name}")
        assert "times as fast" in engine.status()["models"]["wide"]["reason"]
        store.variants("wide").set_default(None)
        engine.add(store.load("wide"), backend="auto", precision="auto")
        rolled_back = row_of(engine, rows).precision["wide"].partition("/")[2]
        assert rolled_back in ("fp32", "fp32+bf16", "bf16"), "the latter where bf16 is native"
        store.variants("wide").set_default(written[0].name)
        engine.add(store.load("wide"), precision="exact")
        assert row_of(engine, rows).precision == {"wide": "eager/fp32"}


def test_a_served_model_is_switched_and_back_without_a_failed_request(found):
    store, task, _, written, _ = found
    low = next(v for v in written if v.evidence.loss <= 2e-3)
    done, stop = [], threading.Event()
    with Engine(device="cpu") as engine:
        engine.add(store.load("wide"), precision="exact")

        def ask():
            while not stop.is_set():
                done.append(row_of(engine, task.rows["x"][:2]).precision["wide"])

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            for precision in (f"variant:{low.name}", "exact", f"variant:{low.name}"):
                engine.add(store.load("wide"), precision=precision)
                count = len(done)
                while len(done) < count + 20 and not any(each.done() for each in asking):
                    row_of(engine, task.rows["x"][:2])
            stop.set()
            for each in asking:
                each.result()
        assert row_of(engine, task.rows["x"][:2]).precision["wide"].endswith(low.name)
    assert {word.partition("/")[2] for word in done} == {"fp32", low.name}


def test_a_variant_that_is_off_does_not_replace_what_serves(found, monkeypatch):
    store, task, _, written, _ = found
    low = next(v for v in written if v.files)
    with Engine(device="cpu") as engine:
        engine.add(store.load("wide"), precision="exact")
        monkeypatch.setitem(TOLERANCE, "int8", 1e-9)
        monkeypatch.setitem(TOLERANCE, "int8_static", 1e-9)
        monkeypatch.setitem(TOLERANCE, "int4", 1e-9)
        monkeypatch.setitem(TOLERANCE, "fp32", 1e-9)
        with pytest.raises(ModelError, match="off the reference"):
            engine.add(store.load("wide"), precision=f"variant:{low.name}")
        assert row_of(engine, task.rows["x"][:2]).precision == {"wide": "eager/fp32"}


def narrow(found, folder) -> tuple[ModelStore, Model, torch.Tensor]:
    """A stored model, its rows, and a variant whose ranges fit rows of that size alone."""
    store = ModelStore(folder)
    rows = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    store.add(Model.from_torch(net, example=rows, name="wide"))
    model = replace(store.load("wide"), example={"input": rows})
    path, _ = quantised_file(model, resolve("int8_static"))
    variants, (written, *_) = store.variants("wide"), found[3]
    facts = {"backend": "onnxruntime", "precision": resolve("int8_static").as_dict(), "needs": ()}
    facts |= {"name": "narrow", "reference": variants.reference, "files": {}}
    variants.add(written.model_copy(update=facts), {"model.onnx": path})
    return store, model, rows


@pytest.mark.parametrize(("times", "taken"), [(1, True), (1000, False)])
def test_a_new_default_is_checked_on_rows_of_recent_calls(found, tmp_path, times, taken):
    store, model, rows = narrow(found, tmp_path)
    with Engine(device="cpu", backend="auto", precision="auto") as engine:
        engine.add(model)
        for row in rows:
            row_of(engine, times * row[None])
        store.variants("wide").set_default("narrow")
        assert engine.renew() == (["wide"] if taken else [])
        facts = engine.status()["models"]["wide"]
        assert row_of(engine, rows[:2]).precision["wide"].endswith("narrow" if taken else "/fp32")
    if taken:
        assert facts["checked_on_recent"]["rows"] == 8
        assert 0 < facts["checked_on_recent"]["difference"] < 0.15
    else:
        assert "on 8 recent rows, allowed is 0.15" in facts["default_refused"]


def test_a_damaged_file_of_a_variant_is_refused(found, tmp_path):
    store, *_ = found
    shutil.copytree(store.root, tmp_path / "store")
    copy = ModelStore(tmp_path / "store")
    variant = next(v for v in copy.variants("wide").list() if v.files)
    path = copy.variants("wide").path(variant, next(iter(variant.files)))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not what was saved"):
        copy.variants("wide").get(variant.name)
    with pytest.raises(ModelError, match="not what was saved"):
        copy.verify("wide")
    facts = path.parent / "variant.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"reference": "0" * 64}))
    with pytest.raises(ModelError, match="another reference"):
        copy.variants("wide").list()


def test_too_few_rows_and_unknown_measures_are_refused(found, tmp_path):
    _, task, *_ = found
    few = replace(task, rows={"x": task.rows["x"][:5]})
    with pytest.raises(ConfigError, match="5 rows are too few"):
        search(few, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        loss_of("cosin")
    with pytest.raises(ConfigError, match="needs a program"):
        loss_of("command")


def test_a_score_beside_columns_that_never_change_is_judged_and_two_scores_are_not():
    labels = torch.tensor([1, 0, 1, 0])
    scores = torch.tensor([0.9, 0.1, 0.8, 0.2])
    want = {"y": torch.stack((scores, torch.ones(4)), dim=1)}
    got = {"y": torch.stack((1 - scores, torch.zeros(4)), dim=1)}
    assert loss_of("auc")(got, want, labels) == 1
    assert loss_of("ap")(want, want, labels) == 0
    with pytest.raises(InputError, match="2 differ from row to row"):
        loss_of("ap")(want, {"y": torch.stack((scores, 1 - scores), dim=1)}, labels)
    with pytest.raises(InputError, match="0 differ from row to row"):
        loss_of("ap")(want, {"y": torch.ones(4, 2)}, labels)


def test_labels_are_held_against_the_scores_beside_the_classes_that_a_model_names():
    labels = torch.tensor([2, 0, 1, 0])
    want = {"label": labels, "probabilities": torch.eye(3)[labels]}
    got = {"label": labels, "probabilities": torch.eye(3)[labels.roll(1)]}
    assert loss_of("accuracy")(want, want, labels) == 0
    assert loss_of("accuracy")(got, want, labels) == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1.0, math.nan, 0.0, 1.0], "the label of row 1 is not a number"),
        ([1, 0, 1], "there are 45 labels for 60 rows"),
        ([1, 0, 2, 1], "0 or 1; they are .*, 0 to 2"),
        ([[1, 0], [0, 1], [1, 0], [0, 1]], "one label for each row"),
    ],
)
def test_labels_that_are_none_are_refused_before_anything_is_trained(labels, said, tmp_path):
    module = nn.Linear(3, 1).eval()
    model = Model.from_torch(module, example=torch.rand(2, 3), name="line")
    (spec,) = model.spec.inputs
    rows = {spec.name: torch.rand(60, 3)}
    many = torch.tensor(labels).repeat(15, *[1] * (torch.tensor(labels).ndim - 1))
    goal = Goal(model, rows, loss_of("auc"), 0.1, 1000, CPU, labels=many)
    with pytest.raises(InputError, match=said):
        shrink(goal, tmp_path)


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "rows"),
    [
        ("cosine", 3, None, torch.ones(60, 3)),  # all are one row
        ("cosine", 1, None, torch.rand(60, 3)),  # a single score has no direction
        ("top1", 3, None, torch.ones(60, 3)),
        ("accuracy", 3, torch.zeros(60, dtype=torch.int64), torch.ones(60, 3)),
        ("command", 3, None, torch.ones(60, 3)),
    ],
)
def test_rows_that_cannot_tell_a_good_model_from_a_bad_one_are_refused(
    metric, outputs, labels, rows, tmp_path
):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, outputs), nn.Sigmoid())
    model = Model.from_torch(module.eval(), example=torch.rand(2, 3), name="line")
    (spec,) = model.spec.inputs
    loss = loss_of(metric, [sys.executable, "-c", "print(0.01)"])
    goal = Goal(model, {spec.name: rows}, loss, 0.02, 1000, CPU, labels=labels)
    with pytest.raises(InputError, match="cannot tell a good model from a bad one"):
        shrink(goal, tmp_path)
    task = Task(model, goal.rows, loss, 0.02, CPU, labels=labels, backends=("eager",))
    with pytest.raises(InputError, match="cannot tell a good model from a bad one"):
        search(task, tmp_path)


def test_measures_are_what_their_names_say(tmp_path):
    truth = np.array([0, 0, 1, 1, 0, 1], bool)
    scores = np.array([0.1, 0.4, 0.35, 0.8, 0.4, 0.4])
    sklearn = pytest.importorskip("sklearn.metrics")
    assert roc_auc(truth, scores) == pytest.approx(sklearn.roc_auc_score(truth, scores))
    assert average_precision(truth, scores) == pytest.approx(
        sklearn.average_precision_score(truth, scores)
    )
    want, got = {"y": torch.eye(4)}, {"y": torch.eye(4)[[1, 0, 2, 3]]}
    assert loss_of("top1")(got, want, None) == 0.5
    assert loss_of("cosine")(got, want, None) == pytest.approx(0.5)
    assert loss_of("cosine")({"y": torch.full((4, 4), torch.nan)}, want, None) == float("inf")
    mask = torch.zeros(1, 2, 4, 4)
    mask[:, 1, :2] = 1
    mask[:, 0, 2:] = 1
    assert loss_of("dice")({"y": mask}, {"y": mask}, None) == 0
    assert loss_of("dice")({"y": mask.flip(2)}, {"y": mask}, None) == 1
    program = tmp_path / "measure.py"
    program.write_text(
        "import sys, numpy\n"
        "a, b = (numpy.load(p)['y'] for p in sys.argv[1:])\n"
        "print(abs(a - b).max())"
    )
    by_command = loss_of("command", [sys.executable, str(program)])
    assert by_command(got, want, None) == 1.0
    with pytest.raises(ConfigError, match="gave no number"):
        loss_of("command", [sys.executable, "-c", "pass"])(got, want, None)
