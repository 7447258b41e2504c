"""``plinth compress`` ends in a smaller variant that an engine serves."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    InputError,
    ModelSpec,
    ModelStore,
    TensorSpec,
    architecture,
)
from plinth.pipelines.cli.main import app
from plinth.pipelines.cli.variants.compress import bytes_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def timed_in_a_moment():
    """Nothing here is about the speed of what is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plinth.engine.optimize.recipes.TIMED_SECONDS", 0.01)
        yield


@architecture("test-sums")
def sums() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a small network that has learnt which of four sums is the largest."""
    folder = tmp_path_factory.mktemp("sums")
    torch.manual_seed(0)
    rows = torch.randn(600, 16)
    truth = rows.reshape(600, 4, 4).sum(2).argmax(1)
    module = sums()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(120):
        loss = nn.functional.cross_entropy(module(rows), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = ModelStore(folder / "store")
    spec = ModelSpec(
        name="own",
        architecture="test-sums",
        inputs=(TensorSpec(name="x", shape=(16,)),),
        outputs=(TensorSpec(name="logits", shape=(4,)),),
    )
    found.save(spec, module)
    np.savez(folder / "rows.npz", x=rows.numpy(), labels=truth.numpy())
    save_file({"x": rows, "labels": truth}, folder / "rows.safetensors")
    return found


def run(store, *options: str):
    folder = store.root.parent
    command = ["compress", "own", "--store", str(store.root), "--max-loss", "0.05", *options]
    if "--data" not in options:
        command += ["--data", str(folder / "rows.npz")]
    return CliRunner().invoke(app, command)


def test_what_cannot_be_reached_changes_nothing_and_is_said(store):
    data = str(store.root.parent / "rows.safetensors")
    done = run(store, "--data", data, "--target", "200x", "--epochs", "0", "--bits", "ternary")
    assert done.exit_code == 1, done.output
    assert "nothing is within 0.05 and the target" in done.stderr
    assert store.variants("own").default is None


def test_a_model_of_ones_own_becomes_six_times_smaller(store):
    picture = store.root.parent / "frontier.png"
    done = run(
        store,
        *("--metric", "accuracy", "--target", "6x", "--sparsity", "0.5", "--bits", "int4"),
        *("--epochs", "15", "--rate", "0.003", "--picture", str(picture), "--json"),
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    taken = next(v for v in told["variants"] if v["name"] == told["default"])
    assert taken["files"]["weights.packed"]["bytes"] <= told["target_bytes"]
    assert 6 * told["target_bytes"] <= told["reference_bytes"]
    evidence = taken["evidence"]
    assert evidence["loss"] <= 0.05
    assert evidence["held_out"] == 120
    assert evidence["reference_bytes"] == store.size("own")
    assert picture.stat().st_size > 1000

    variant = store.variants("own").get(told["default"])
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    with Engine(threads=1) as engine:
        engine.add(store.load("own"), backend="auto", precision="auto")
        assert engine.status()["models"]["own"]["variant"] == variant.name
        answered = engine.run(_infer(rows)).value
        engine.add(store.load("own"), backend="eager", precision="exact")
        whole = engine.run(_infer(rows)).value
    assert not torch.equal(answered, whole), "another model answers"
    assert (answered.argmax(1) == whole.argmax(1)).float().mean() >= 0.8

    shown = CliRunner().invoke(app, ["models", "show", "own", "--store", str(store.root), "--json"])
    facts = json.loads(shown.stdout)
    assert facts["bytes"] == store.size("own")
    assert [v["bytes"] for v in facts["variants"] if v["default"]] == [variant.bytes]


@pytest.mark.soak
def test_even_steps_need_no_training(store, tmp_path):
    own = ModelStore(shutil.copytree(store.root, tmp_path / "store"))
    data = str(store.root.parent / "rows.npz")
    options = ("--metric", "accuracy", "--bits", "even", "--epochs", "0", "--json")
    done = run(own, "--data", data, *options)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    (taken,) = (v for v in told["variants"] if v["name"] == told["default"])
    assert "even" in taken["compression"]
    assert "feedback" in taken["compression"], "without training, errors are made good"
    assert taken["evidence"]["loss"] <= 0.05
    assert own.size("own") > 4 * taken["files"]["weights.packed"]["bytes"]
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    whole = own.load("own").run({"x": rows})["logits"]
    with Engine(threads=1) as engine:
        engine.add(own.load("own"), backend="auto", precision="auto")
        answered = engine.run(_infer(rows)).value
    assert not torch.equal(answered, whole), "another model answers"
    assert (answered.argmax(1) == whole.argmax(1)).float().mean() >= 0.9


def _infer(rows):
    return (yield Call("own", rows))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "small"], "is no size"),
        (["--bits", "int5"], "no weights of 'int5'"),
        (["--sparsity", "1.5"], "a share from 0 to below 1"),
        (["--metric", "cosine", "--data", "absent.npz"], "absent.npz cannot be read"),
    ],
)
def test_what_is_not_possible_is_said_with_what_to_do(store, options, said):
    done = run(store, *options)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_sizes_are_read_as_people_write_them():
    assert bytes_of("3.2MB", 1) == 3_200_000
    assert bytes_of("200 KiB", 1) == 204_800
    assert bytes_of("32x", 102_400) == 3_200
    assert bytes_of("5000", 1) == 5_000
    for none in ("0", "-1MB", "3,2MB", "1e3kB", "nan", "x", "9" * 400, "9" * 30 + "x", "0.5"):
        with pytest.raises(ConfigError, match="is no size"):
            bytes_of(none, 1_000)


@pytest.mark.parametrize("whole", [b"PK\x03\x04nonsense", b"\x93NUMPY\x01", b""])
def test_a_file_of_rows_that_is_none_is_refused_by_name(store, tmp_path, whole):
    (tmp_path / "rows.npz").write_bytes(whole)
    ended = run(store, "--data", str(tmp_path / "rows.npz"))
    assert isinstance(ended.exception, InputError)
    assert "rows.npz cannot be read" in ended.exception.message
