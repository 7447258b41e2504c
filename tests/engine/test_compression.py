"""Pruning, quantisation-aware training and distillation compose, and end in a packed file."""

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from plinth.engine import (
    ConfigError,
    InputError,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    TensorSpec,
    architecture,
)
from plinth.engine.backends.variants import load_variant
from plinth.engine.compression.feedback import moments
from plinth.engine.compression.packing import Coded, PackedFile
from plinth.engine.compression.pruning import Pruning
from plinth.engine.compression.registry import Recipe, Transform, Weight, known, register
from plinth.engine.compression.training import compress
from plinth.engine.devices.device import pick
from plinth.engine.models.weights import PACKED
from plinth.engine.optimize.keep import keep_small
from plinth.engine.optimize.measures import loss_of
from plinth.engine.optimize.recipes import Goal, ladder, shrink

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module", autouse=True)
def timed_in_a_moment():
    """Nothing here is about the speed of what is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plinth.engine.optimize.recipes.TIMED_SECONDS", 0.01)
        yield


@architecture("test-shapes")
def shapes() -> nn.Module:
    """A small convolutional network: (n, 1, 8, 8) to logits (n, 3)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
    )


SPEC = ModelSpec(
    name="shapes",
    architecture="test-shapes",
    inputs=(TensorSpec(name="x", shape=(1, 8, 8)),),
    outputs=(TensorSpec(name="logits", shape=(3,)),),
)


def forward(module, rows):
    return {"logits": module(rows["x"])}


@pytest.fixture(scope="module")
def trained():
    """A network that tells rows, columns and noise apart, and what it learnt on."""
    noise = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (500,), generator=noise)
    lines = torch.randn(500, 8, generator=noise)
    images = torch.randn(500, 1, 8, 8, generator=noise) * 0.7
    images[truth == 0, 0] += lines[truth == 0][:, :, None]
    images[truth == 1, 0] += lines[truth == 1][:, None, :]
    torch.manual_seed(0)
    module = shapes()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(6):
        for chosen in torch.arange(500).split(50):
            loss = nn.functional.cross_entropy(module(images[chosen]), truth[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval(), images, truth


def recipe(epochs: int = 2, **steps) -> Recipe:
    return Recipe(steps, epochs=epochs, batch=50, rate=2e-3)


def right(module, images, truth) -> float:
    with torch.inference_mode():
        return float((module(images).argmax(1) == truth).float().mean())


def test_the_three_algorithms_compose_and_what_was_trained_is_what_is_stored(trained, tmp_path):
    module, images, truth = trained
    before = {name: value.clone() for name, value in module.state_dict().items()}
    steps = {
        "pruning": {"sparsity": 0.8},
        "quantization_aware": {"bits": "ternary"},
        "distillation": {},
    }
    found = compress(module, {"x": images}, recipe(6, **steps), forward, truth)
    assert right(found.module, images, truth) > right(module, images, truth) - 0.06
    assert found.zeros / found.weights > 0.75
    codes = found.tensors["4.weight"]
    assert isinstance(codes, Coded)
    assert set(codes.codes.unique().tolist()) == {-1, 0, 1}
    assert len(codes.scales) == 32, "a scale for each channel"
    found.write(tmp_path / "weights.packed")
    with PackedFile(tmp_path / "weights.packed") as file:
        for name, value in found.module.state_dict().items():
            assert torch.equal(file.dense(name), value), name
    assert (tmp_path / "weights.packed").stat().st_size < 2500
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_same_recipe_and_rows_give_the_same_bits(trained):
    module, images, _ = trained
    steps = {"pruning": {"sparsity": 0.5}, "quantization_aware": {"bits": "int4"}}
    once, again = (
        compress(module, {"x": images}, recipe(1, **steps), forward).module.state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize(
    ("bits", "high"), [("int8", 127), ("even", 127), ("int4", 7), ("ternary", 1)]
)
def test_weights_of_few_bits_without_any_training(trained, bits, high):
    module, images, _ = trained
    steps = {"quantization_aware": {"bits": bits, "ends": bits}}
    found = compress(module, {"x": images[:60]}, recipe(0, **steps), forward)
    coded = [value for value in found.tensors.values() if isinstance(value, Coded)]
    assert len(coded) == 3
    assert all(int(value.codes.abs().max()) <= high for value in coded)
    want, got = module(images[60:]), found.module(images[60:])
    cosine = nn.functional.cosine_similarity(want, got).mean()
    assert cosine > {"int8": 0.9999, "even": 0.99, "int4": 0.98, "ternary": 0.8}[bits]


def test_error_feedback_makes_good_what_rounding_does_to_the_answers(trained):
    module, images, _ = trained
    off = []
    for feedback in (False, True):
        steps = {"quantization_aware": {"bits": "even", "step": 0.8, "feedback": feedback}}
        found = compress(module, {"x": images[:60]}, recipe(0, **steps), forward)
        with torch.no_grad():
            off.append(float((found.module(images[60:]) - module(images[60:])).square().mean()))
    assert off[1] < 0.7 * off[0]
    label = recipe(0, **steps).label
    assert label == "even, error feedback"
    with pytest.raises(ConfigError, match="step is 5"):
        recipe(0, quantization_aware={"bits": "even", "step": 5}).build()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 8),
        nn.Conv1d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(2, 8, 3, dilation=2, padding=2),
    ],
)
def test_moments_are_of_what_each_weight_is_multiplied_with(layer):
    """x' H x of a change of the weights is the mean square of the change of the answers."""
    x = {2: torch.randn(400, 12), 3: torch.randn(40, 3, 20), 4: torch.randn(9, 2, 12, 12)}
    rows = x[layer.weight.ndim]
    net = nn.Sequential(layer)
    products = moments(net, (net(rows) for _ in range(1)), {"0.weight"})["0.weight"]
    change = torch.randn_like(layer.weight)
    with torch.no_grad():
        before = layer(rows)
        layer.weight += change
        moved = (layer(rows) - before).double()
    channel = 1 if layer.weight.ndim > 2 else -1
    want = moved.square().movedim(channel, 0).flatten(1).mean(1)
    flat = change.flatten(1).double()
    assert torch.allclose(((flat @ products) * flat).sum(1), want, rtol=1e-4)


def test_batch_norm_that_went_into_scales_leaves_the_answers(trained):
    """int8 without training: all that changes is rounding, so that a wrong fold would show."""
    module, images, _ = trained
    found = compress(module, {"x": images}, recipe(0, quantization_aware={}), forward)
    state = found.module.state_dict()
    assert not state["1.running_mean"].any()
    assert (state["1.running_var"] == 1).all()
    assert torch.allclose(found.module(images), module(images), atol=0.05)


def test_sparsity_is_reached_over_all_layers_but_the_small_ends(trained):
    module, images, _ = trained
    found = compress(module, {"x": images}, recipe(2, pruning={"sparsity": 0.7}), forward)
    assert 0 < found.weights - module[4].weight.numel() < 250, "first and last stay dense"
    assert abs(found.zeros / module[4].weight.numel() - 0.7) < 0.01


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_dynamic_mask_follows_the_gradient_and_lets_weights_come_back(dynamic):
    pruning = Pruning(sparsity=0.5, dynamic=dynamic)
    value = nn.Parameter(torch.tensor([[0.1, 0.2, 3.0, 4.0]]))
    weight = Weight("weight", value, axis=0, ends=False)
    pruning.begin([weight])
    pruning.at(0.6)
    used = pruning.forward(weight, value)
    assert used.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    used.sum().backward()
    assert value.grad.tolist() == [[1.0 if dynamic else 0.0] * 2 + [1.0, 1.0]]
    with torch.no_grad():
        value[0, 0] = 5.0
    pruning.at(0.7)
    assert pruning.forward(weight, value).tolist() == [[5.0, 0.0, 0.0, 4.0]]


def test_channels_that_are_gone_make_the_layers_smaller_and_load_again(trained, tmp_path):
    module, images, truth = trained
    steps = {"pruning": {"channels": 0.5}, "quantization_aware": {"bits": "int8"}}
    said: list[str] = []
    found = compress(module, {"x": images}, recipe(6, **steps), forward, truth, said.append)
    assert "0: 8 of 16 channels stay" in said
    assert found.module[0].weight.shape == (8, 1, 3, 3)
    assert found.module[1].num_features == 8
    assert found.module[4].in_channels == 8
    assert right(found.module, images, truth) > right(module, images, truth) - 0.06


def test_layers_become_products_that_compose_with_the_others_and_load_again(trained, tmp_path):
    module, images, truth = trained
    steps = {
        "low_rank": {"energy": 0.8},
        "pruning": {"sparsity": 0.3},
        "quantization_aware": {"bits": "int4"},
        "distillation": {},
    }
    said: list[str] = []
    found = compress(module, {"x": images}, recipe(6, **steps), forward, truth, said.append)
    rank = found.module[4].down.weight.shape[0]
    assert found.module[4].down.weight.shape == (rank, 16, 3, 3)
    assert found.module[4].up.weight.shape == (32, rank, 1, 1)
    assert f"4: rank {rank} of 32" in said
    assert rank * (16 * 9 + 32) < 0.9 * module[4].weight.numel()
    assert found.module[4].weight.shape == module[4].weight.shape
    assert right(found.module, images, truth) > right(module, images, truth) - 0.06
    store = ModelStore(tmp_path)
    store.save(SPEC, found)
    loaded = store.load("shapes").module
    assert type(loaded[9]) is nn.Linear, "which would not become smaller"
    assert torch.equal(loaded(images[:5]), found.module(images[:5]))
    plain = compress(module, {"x": images}, recipe(0, low_rank={"energy": 0.8}), forward).module
    want = module[4].weight.flatten(1)
    off = (plain[4].weight.flatten(1) - want).square().sum() / want.square().sum()
    assert 0.1 < off <= 0.2 + 1e-4, "the best product of its rank keeps 80 %"
    with pytest.raises(ConfigError, match="no layer becomes smaller"):
        compress(
            nn.Sequential(nn.Linear(8, 8)),
            {"x": torch.ones(4, 8)},
            recipe(0, low_rank={"energy": 0.99}),
            forward,
        )


def test_a_compressed_model_is_one_more_kind_of_version_in_the_store(trained, tmp_path):
    module, images, _ = trained
    steps = {"quantization_aware": {"bits": "int4"}}
    found = compress(module, {"x": images}, recipe(0, **steps), forward)
    store = ModelStore(tmp_path)
    folder = store.save(SPEC, found)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", PACKED.name]
    assert torch.equal(store.load("shapes").module(images[:5]), found.module(images[:5]))
    path = folder / PACKED.name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"weights.packed is missing or not what was saved"):
        store.load("shapes")


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory):
    """A store with a model, and what a search left there."""
    module, images, truth = trained
    store = ModelStore(tmp_path_factory.mktemp("store"))
    store.save(SPEC, module)
    model = store.load("shapes")
    size = store.size("shapes")
    rungs = ((0.0, "int8"), (0.5, "int4"))
    goal = Goal(
        *(model, {"x": images}, loss_of("accuracy"), 0.08, size, pick("cpu")),
        target=size // 4,
        labels=truth,
        recipes=ladder(recipe(3), 0.25, rungs),
    )
    work = tmp_path_factory.mktemp("work")
    frontier = shrink(goal, work)
    variants = store.variants("shapes")
    written = keep_small(frontier, goal, variants, metric="accuracy", data="lines")
    return store, frontier, written, images


def test_a_search_leaves_its_frontier_in_the_store_with_evidence(kept):
    store, frontier, written, _ = kept
    assert frontier.best is not None
    assert frontier.best.bytes <= store.size("shapes") // 4
    assert store.variants("shapes").default == written[0].name
    evidence = written[0].evidence
    assert (evidence.held_out, evidence.data, evidence.metric) == (100, "lines", "accuracy")
    assert evidence.reference_bytes == store.size("shapes")
    assert written[0].bytes == frontier.best.bytes
    assert evidence.sparsity > 0.4
    assert evidence.speed > 0
    store.verify("shapes")


def test_two_searches_that_end_at_once_both_keep_what_they_found(kept, monkeypatch):
    store, frontier, (taken, *_), _ = kept
    variants = store.variants("shapes")
    monkeypatch.setattr("plinth.engine.optimize.keep.MAX_VARIANTS", 1)
    listed = iter([[]])  # before the other one had written
    look = variants.list
    monkeypatch.setattr(variants, "list", lambda: next(listed, None) or look())
    goal = Goal(store.load("shapes"), {}, loss_of("accuracy"), 0.08, 1, pick("cpu"))
    (written,) = keep_small(frontier, goal, variants, metric="accuracy", data="lines")
    try:
        assert written.name == f"{taken.name}.2"
        assert variants.get(written.name).files == taken.files
    finally:
        variants.set_default(taken.name)
        shutil.rmtree(variants.folder / written.name)


def test_what_gave_no_numbers_is_not_kept(kept):
    """Its loss could not be read again, nor with it any variant of the model."""
    store, frontier, _, images = kept
    failed = replace(frontier.best, bytes=1, loss=float("inf"))
    none = replace(frontier, points=[failed], best=None)
    goal = Goal(store.load("shapes"), {"x": images}, loss_of("top1"), 0.08, 1, pick("cpu"))
    variants = store.variants("shapes")
    before = variants.list()
    assert keep_small(none, goal, variants, metric="accuracy", data="lines") == []
    assert variants.list() == before
    for allowed in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ConfigError, match="max_loss is"):
            shrink(replace(goal, max_loss=allowed), store.root)


def test_a_disk_that_fills_up_keeps_the_best_and_leaves_nothing_in_part(kept, monkeypatch):
    store, frontier, (taken, *_), _ = kept
    best = frontier.best
    other = replace(best, bytes=2 * best.bytes, loss=best.loss - 1)
    two = replace(frontier, points=[best, other])
    variants = store.variants("shapes")
    there = sorted(variants.folder.iterdir())
    goal = Goal(store.load("shapes"), {}, loss_of("accuracy"), 0.08, 1, pick("cpu"))
    copy, copied = shutil.copyfile, []

    def full_after_one(source, target):
        copied.append(target)
        if len(copied) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full_after_one)
    try:
        with pytest.raises(ModelError, match=r"cannot be written to .*: No space left on device"):
            keep_small(two, goal, variants, metric="accuracy", data="lines")
        assert variants.default == f"{taken.name}.2"
        assert sorted(variants.folder.iterdir()) == sorted(
            [*there, variants.folder / f"{taken.name}.2"]
        )
    finally:
        variants.set_default(taken.name)
        shutil.rmtree(variants.folder / f"{taken.name}.2", ignore_errors=True)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_packed_weights_with_fewer_channels_run_in_each_backend(kept, backend):
    store, _, written, images = kept
    model = store.load("shapes")
    path = store.root / "shapes" / "1" / "variants" / written[0].name / "variant.json"
    before = path.read_text()
    path.write_text(replace_backend(before, backend))
    try:
        executable = load_variant(model, pick("cpu"), 1, written[0].name)
    finally:
        path.write_text(before)
    assert executable.backend == backend
    got = executable.run({"x": images[:9]})["logits"]
    eager = load_variant(model, pick("cpu"), 1, written[0].name).run({"x": images[:9]})["logits"]
    assert torch.allclose(got, eager, atol=1e-5)


def replace_backend(text: str, backend: str) -> str:
    return text.replace('"backend": "eager"', f'"backend": "{backend}"').replace(
        '"backend":"eager"', f'"backend":"{backend}"'
    )


def test_a_packed_file_of_another_model_is_refused_by_name(kept):
    store, _, written, _ = kept
    model = replace(store.load("shapes"), module=nn.Sequential(nn.Linear(64, 3)).eval())
    with pytest.raises(ModelError, match="shapes: tensor 0"):
        load_variant(model, pick("cpu"), 1, written[0].name)


def test_an_algorithm_of_ones_own_is_one_class(trained):
    @register("test-halving")
    class Halving(Transform):
        """Half of every weight."""

        def __init__(self, factor: float = 0.5) -> None:
            self.factor = factor

        def forward(self, weight, value):
            """See the base class."""
            return value * self.factor

    module, images, _ = trained
    found = compress(module, {"x": images}, recipe(0, **{"test-halving": {}}), forward)
    assert torch.equal(found.module[9].weight, module[9].weight * 0.5)
    assert "test-halving" in known()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({"prunning": {}}, "no compression 'prunning'"),
        ({"pruning": {"sparcity": 0.5}}, "no setting 'sparcity'"),
        ({"pruning": {"sparsity": 1.0}}, "sparsity is 1.0"),
        ({"quantization_aware": {"bits": "int5"}}, "no weights of 'int5'"),
        ({"distillation": {"temperature": 0}}, "temperature 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(trained, steps, said):
    module, images, _ = trained
    with pytest.raises(ConfigError, match=said):
        compress(module, {"x": images}, recipe(1, **steps), forward)


def test_rows_that_are_no_numbers_are_refused_before_they_spoil_the_weights(trained):
    module, images, _ = trained
    spoiled = images.clone()
    spoiled[3] = float("nan")
    for epochs in (0, 1):
        with pytest.raises(InputError, match="NaN or infinite for row 3"):
            compress(module, {"x": spoiled}, recipe(epochs, quantization_aware={}), forward)


@pytest.mark.parametrize("steps", [{"quantization_aware": {}}, {"low_rank": {"energy": 0.9}}])
def test_weights_that_are_no_numbers_are_refused_by_name(steps):
    module = shapes().eval()
    with torch.no_grad():
        module[4].weight[0, 0, 0, 0] = float("nan")
    rows = {"x": torch.randn(60, 1, 8, 8)}
    with pytest.raises(InputError, match=r"weight 4\.weight has values that are NaN"):
        compress(module, rows, recipe(0, **steps), forward)


@pytest.mark.parametrize("steps", [{"quantization_aware": {}}, {"low_rank": {"energy": 0.5}}])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: net.double(), "no float32 weights|no layer becomes smaller"),
        (
            lambda net: net.register_buffer("phase", torch.ones(2, dtype=torch.complex64)),
            "tensor phase is complex64, which a packed file does not hold",
        ),
    ],
)
def test_weights_of_other_kinds_are_refused_before_any_training(steps, change, said):
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    change(net)
    rows = {"x": torch.randn(60, 16, dtype=net[0].weight.dtype)}
    with pytest.raises(ConfigError, match=said):
        compress(net, rows, recipe(1, **steps), forward)


def test_a_table_with_sparse_gradients_is_trained_like_others():
    net = nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Flatten(), nn.Linear(32, 3)).eval()
    rows = {"x": torch.randint(0, 50, (60, 2))}
    small = compress(net, rows, recipe(1, quantization_aware={"bits": "int4"}), forward)
    assert net[0].sparse
    assert not torch.equal(small.module[0].weight, net[0].weight)


def test_a_layer_whose_weight_is_computed_keeps_its_channels():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    module = nn.Sequential(normed, nn.ReLU(), nn.Linear(16, 3)).eval()
    rows = {"x": torch.randn(60, 8)}
    with pytest.raises(ConfigError, match="no channel can be removed"):
        compress(module, rows, recipe(0, pruning={"channels": 0.5}), forward)


def test_tied_weights_stay_one_and_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids).mean(1))

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (64, 5))
    found = compress(
        *(Tied(), {"x": ids}, recipe(1, quantization_aware={"bits": "int4"}), forward),
    )
    assert found.shared == {"out.weight": "embed.weight"}
    assert found.module.out.weight is found.module.embed.weight
    found.write(tmp_path / "weights.packed")
    with PackedFile(tmp_path / "weights.packed") as file:
        assert file.entries["out.weight"].kind == "same"
        assert torch.equal(file.dense("out.weight"), found.module.embed.weight)


def test_an_exported_program_is_compressed_without_its_code(trained, tmp_path):
    module, images, _ = trained
    store = ModelStore(tmp_path)
    store.add(Model.from_torch(module, example=images[:8], name="program"))
    model = store.load("program")
    (spec,) = model.spec.inputs
    goal = Goal(
        *(model, {spec.name: images}, loss_of("top1"), 0.1, store.size("program"), pick("cpu")),
        recipes=ladder(recipe(2), 0.0, ((0.5, "int4"),)),
    )
    frontier = shrink(goal, tmp_path)
    assert frontier.best is not None, frontier.points
    variants = store.variants("program")
    (written,) = keep_small(frontier, goal, variants, metric="top1", data="lines")
    executable = load_variant(model, pick("cpu"), 1, written.name)
    assert executable.run({spec.name: images[:3]})


def test_onnx_files_and_a_handful_of_rows_are_refused(trained, tmp_path):
    module, images, _ = trained
    model = Model(SPEC, module)
    goal = Goal(model, {"x": images[:5]}, loss_of("top1"), 0.1, 1000, pick("cpu"))
    with pytest.raises(ConfigError, match="5 rows are too few"):
        shrink(goal, tmp_path)
    other = replace(goal, rows={"x": images}, model=replace(model, onnx=tmp_path / "net.onnx"))
    with pytest.raises(ConfigError, match="an ONNX file, which cannot be trained"):
        shrink(other, tmp_path)
