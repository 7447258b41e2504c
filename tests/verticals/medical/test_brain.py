"""MeshNet, a real network, on a real T1; and nnU-Net's networks from their own folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from medical.own_networks import extra

from plinth.engine import Call, Engine, ModelError
from plinth.engine.models.families import planes
from plinth.verticals.medical.networks.analysis import tiling_of, window_of
from plinth.verticals.medical.networks.load import load_network, with_window
from plinth.verticals.medical.networks.meshnet import MeshNet
from plinth.verticals.medical.networks.prepare import Axis, Prepared, prepare
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

MODELS = Path(__file__).resolve().parents[4] / "shared" / "models" / "meshnet"
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason="no real networks beside the checkout"
)


def head(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Volume:
    """A ball in a ball, as MR."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    voxels = np.where(radius < 0.5, 800, np.where(radius < 0.8, 400, 10)).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    facts = SeriesFacts("ball", "MR", "", shape[1], shape[2], spacing, shape[0])
    return Volume(voxels, affine, Verdict(), facts)


@needs_models
@pytest.mark.parametrize(
    "name", ["model5_gw_ae", pytest.param("model21_104class", marks=pytest.mark.slow)]
)
def test_windows_cut_at_the_halo_give_the_labels_of_one_pass(name):
    """104 classes are never held: windows give labels, and the volume's are uint8."""
    network = load_network(MODELS / name)
    size = (16, 16, 112)
    rows = torch.rand(1, *size, generator=torch.Generator().manual_seed(1))
    halo = network.recipe.window.halo
    assert halo is not None
    windows = with_window(network, (16, 16, 2 * halo[0] + 10))
    with torch.inference_mode():
        whole = network.model.module(rows[None])[0, 0]
    axes = tuple(Axis(n, size[n], size[n], 0.0, 1.0, (0, size[n])) for n in range(3))
    tiling = tiling_of(Prepared(rows, axes, size), windows.recipe)
    with Engine(threads=1, backend="eager") as engine:
        engine.add(windows.model, batch_range=(1, 1))
        call = Call(windows.model.spec.name, rows, tiling=tiling)
        got = engine.submit(call).result().value
    assert got.dtype == torch.uint8
    assert torch.equal(got, whole)


@pytest.mark.parametrize("depth", [1, 5, 37])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_planes_one_after_the_other_give_the_labels_of_one_pass(
    depth: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than the kernels reach or longer; no result is there for all planes at once."""
    torch.manual_seed(depth)
    layers = [(1, 5, 3, 1, True), (5, 4, 3, 8, True), (4, 6, 3, 3, False), (6, 3, 1, 1, True)]
    network = MeshNet(layers, activation, labels=True).eval()
    volume = torch.rand(2, 1, depth, 19, 23)
    seen: list[tuple[int, int]] = []
    convolved = planes.convolved

    def watched(
        layer: torch.nn.Conv3d, given: torch.Tensor, apart: int | None = None
    ) -> torch.Tensor:
        made = convolved(layer, given, apart)
        seen.append((made.shape[2], len(made)))
        return made

    monkeypatch.setattr(planes, "convolved", watched)
    whole = network(volume)
    assert not seen  # with gradients it is one pass
    with torch.inference_mode():
        labels = network(volume)
    assert labels.dtype == torch.uint8
    assert labels.is_contiguous()
    assert (labels != whole).float().mean() < 1e-3
    assert set(seen) == {(1, 1)}


@needs_models
def test_values_are_scaled_as_each_network_says_of_itself():
    robust = load_network(MODELS / "model5_gw_ae").recipe.steps[-1]
    by_quantiles = load_network(MODELS / "model20chan3cls").recipe.steps[-1]
    assert (robust.low, robust.high, robust.percentiles, robust.clip) == (0, 99.9, True, True)
    assert (by_quantiles.low, by_quantiles.high, by_quantiles.percentiles) == (5, 95, True)


@needs_models
def test_windows_are_as_large_as_memory_allows_and_never_change_the_halo():
    network = load_network(MODELS / "model5_gw_ae")
    sizes = [window_of(network, mb).recipe.window.size for mb in (60, 100, 200, 4000)]
    assert sizes[2:] == [(256, 256, 256)] * 2  # plane by plane all of it takes less than 200 MB
    assert all(size[0] == 256 for size in sizes)  # planes are as many as there are; rows are cut
    voxels = [int(np.prod(size)) for size in sizes]
    assert voxels == sorted(voxels)
    taken = [network.model.module.forward_bytes(size) for size in sizes]
    assert taken[0] <= 60e6 < taken[1] <= 100e6 < taken[2] <= 200e6
    whole = load_network(MODELS / "model5_gw_ae", uncertainty=True)  # logits, all at once
    halved = window_of(whole, 500).recipe.window.size
    assert np.prod(halved) * 11 * 4 <= 500e6 < 256**3 * 11 * 4


@needs_models
def test_labels_of_a_conformed_head_lie_on_the_head():
    """Whatever the network says: what is outside the field of view comes back as background."""
    network = load_network(MODELS / "model5_gw_ae")
    volume = head((40, 50, 60), (4.0, 4.0, 4.0))
    ready = prepare(volume, network.recipe)
    assert ready.shape == (256, 256, 256)
    bright = (ready.rows[0] > 0.4).to(torch.uint8).numpy()
    back = ready.to_native(ready.nearest(bright))
    assert ((back > 0) == (volume.voxels > 300)).mean() > 0.99


def _nnunet(folder: Path, **changed: object) -> Path:
    """A results folder of nnU-Net v2 with a small network of random weights."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    kwargs = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    plans = {
        "dataset_name": "Dataset001_Ball",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 300.0, "std": 200.0, "percentile_00_5": 0.0, "percentile_99_5": 700.0}
        },
        "configurations": {
            "3d_fullres": {
                "spacing": [3.0, 2.0, 2.0],
                "patch_size": [16, 32, 32],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {
                    "is_seg": False,
                    "order": 3,
                    "order_z": 0,
                    "force_separate_z": None,
                },
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet"
                    ".PlainConvUNet",
                    "arch_kwargs": kwargs,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    } | changed
    dataset = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "inner": 1, "outer": 2},
        "file_ending": ".nii.gz",
    }
    fold = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold.parent / "plans.json").write_text(json.dumps(plans))
    (fold.parent / "dataset.json").write_text(json.dumps(dataset))
    torch.manual_seed(5)
    from torch import nn

    options = kwargs | {
        "conv_op": nn.Conv3d,
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    }
    network = unet.PlainConvUNet(input_channels=1, num_classes=3, deep_supervision=True, **options)
    # As nnU-Net saves them: weights among numbers of NumPy.
    checkpoint = {"network_weights": network.state_dict(), "_best_ema": np.float64(0.5)}
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    return fold.parent


def test_folds_without_final_weights_are_said(tmp_path):
    extra("dynamic_network_architectures")
    folder = _nnunet(tmp_path)
    (folder / "fold_1").mkdir()
    (folder / "fold_2").mkdir()
    final = (folder / "fold_0" / "checkpoint_final.pth").read_bytes()
    (folder / "fold_2" / "checkpoint_best.pth").write_bytes(final)
    assert load_network(folder).recipe.notes == (
        "2 fold(s): fold_0, fold_2 (checkpoint_best)",
        "without weights, left out: fold_1",
    )


def test_an_nnunet_that_was_trained_to_ignore_a_label_gives_the_others(tmp_path):
    extra("dynamic_network_architectures")
    folder = _nnunet(tmp_path)
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["labels"]["ignore"] = 3  # no channel of the output, by nnU-Net's LabelManager
    (folder / "dataset.json").write_text(json.dumps(dataset))
    recipe = load_network(folder).recipe
    assert (recipe.labels, recipe.channels) == ({1: "inner", 2: "outer"}, 3)


def test_an_nnunet_folder_gives_what_its_own_steps_give(tmp_path):
    """Crop, normalise, resample by splines, even windows, logits back, argmax."""
    extra("dynamic_network_architectures")
    folder = _nnunet(tmp_path)
    network = load_network(folder)
    assert network.recipe.labels == {1: "inner", 2: "outer"}
    volume = head((20, 40, 44), (2.5, 2.5, 4.0))
    ready = prepare(volume, network.recipe)
    # skimage.transform.resize(order=3, mode="edge", anti_aliasing=False), which nnU-Net calls
    from scipy import ndimage

    values = np.clip(volume.voxels.astype(np.float32), 0, 700)
    values = (values - 300) / 200
    shape = [
        round(n * have / want)
        for n, have, want in zip(volume.shape, (4.0, 2.5, 2.5), (3.0, 2.0, 2.0), strict=True)
    ]
    zoom = [m / n for n, m in zip(volume.shape, shape, strict=True)]
    resized = ndimage.zoom(values, zoom, order=3, mode="nearest", grid_mode=True)
    resized = np.clip(resized, values.min(), values.max())
    assert ready.shape == resized.shape
    np.testing.assert_allclose(ready.rows[0].numpy(), resized, atol=2e-3)
    tiling = tiling_of(ready, network.recipe)
    assert tiling.even
    assert tiling.overlap == 0.5
    with Engine(threads=1, backend="eager") as engine:
        engine.add(network.model, batch_range=(1, 1))
        call = Call(network.model.spec.name, ready.rows, tiling=tiling)
        labels = ready.to_native(engine.submit(call).result().value.numpy())
    assert labels.shape == volume.shape
    assert set(np.unique(labels)) <= {0, 1, 2}


def test_an_nnunet_coarse_axis_is_taken_by_itself_both_ways(tmp_path):
    """Planes by cubic splines that stay within the plane's values, then the nearest plane."""
    extra("dynamic_network_architectures")
    folder = _nnunet(tmp_path)
    (plans,) = folder.glob("plans.json")
    found = json.loads(plans.read_text())
    found["configurations"]["3d_fullres"] |= {
        "spacing": [9.0, 2.0, 2.0],
        "normalization_schemes": ["NoNormalization"],
    }
    plans.write_text(json.dumps(found))
    network = load_network(folder)
    volume = head((20, 24, 22), (2.5, 2.5, 4.0))
    volume.voxels[:, 0, 0] = 1 + np.arange(20)  # no plane is empty: nothing is cropped
    volume.voxels[:, -1, -1] = 1
    recipe = network.recipe.model_copy(
        update={"window": network.recipe.window.model_copy(update={"size": None})}
    )
    ready = prepare(volume, recipe)
    from scipy import ndimage

    planes = []
    for plane in volume.voxels.astype(np.float32):
        zoom = (30 / 24, round(22 * 1.25) / 22)
        wide = ndimage.zoom(plane, zoom, order=3, mode="nearest", grid_mode=True)
        planes.append(np.clip(wide, plane.min(), plane.max()))
    taken = [int(np.floor(20 / 9 * (k + 0.5))) for k in range(9)]
    np.testing.assert_allclose(ready.rows[0].numpy(), np.stack(planes)[taken], atol=0.5)
    onto = ready.onto
    assert onto is not None
    assert onto.nearest == (True, False, False)
    assert tiling_of(ready, recipe).interpolate == "raw"


def test_an_nnunet_that_resamples_its_outputs_otherwise_is_refused(tmp_path):
    folder = _nnunet(tmp_path)
    found = json.loads((folder / "plans.json").read_text())
    found["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"] = {"order": 3}
    (folder / "plans.json").write_text(json.dumps(found))
    with pytest.raises(ModelError, match="outputs resampled"):
        load_network(folder)


@pytest.mark.parametrize("named_in", ["plans", "dataset"])
def test_an_nnunet_reader_that_turns_images_turns_them_here(named_in, tmp_path):
    """TotalSegmentator and many others were trained on images turned to RAS."""
    extra("dynamic_network_architectures")
    told = {"image_reader_writer": "NibabelIOWithReorient"} if named_in == "plans" else {}
    folder = _nnunet(tmp_path, **told)
    if named_in == "dataset":
        dataset = json.loads((folder / "dataset.json").read_text())
        dataset["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
        (folder / "dataset.json").write_text(json.dumps(dataset))
    volume = head((20, 40, 44), (2.5, 2.5, 4.0))
    volume.voxels[:, :8] //= 2  # anterior, as columns and rows of an axial LPS stack ascend
    ready = prepare(volume, load_network(folder).recipe)
    import nibabel

    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image = nibabel.Nifti1Image(volume.voxels.transpose(2, 1, 0), ras)
    read = nibabel.as_closest_canonical(image).get_fdata().transpose(2, 1, 0)
    values = (np.clip(read, 0, 700) - 300) / 200
    from scipy import ndimage

    zoom = [m / n for n, m in zip(values.shape, ready.shape, strict=True)]
    resized = ndimage.zoom(values, zoom, order=3, mode="nearest", grid_mode=True)
    resized = np.clip(resized, values.min(), values.max())
    np.testing.assert_allclose(ready.rows[0].numpy(), resized, atol=2e-3)
    marks = ready.nearest((ready.rows[0] > 0).to(torch.uint8).numpy())
    assert ((ready.to_native(marks) > 0) == (volume.voxels > 300)).mean() > 0.97


def test_an_nnunet_reader_that_is_not_its_own_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Tiff3DIO"):
        load_network(_nnunet(tmp_path, image_reader_writer="Tiff3DIO"))


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        ("network_class_name", "os.system", "os.system"),
        ("network_class_name", "my.own.Network", "my.own.Network"),
        ("conv_op", "builtins.exec", "builtins.exec"),
    ],
)
def test_plans_that_name_code_are_refused(where, value, named, tmp_path):
    folder = _nnunet(tmp_path)
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    if where in architecture:
        architecture[where] = value
    else:
        architecture["arch_kwargs"][where] = value
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match=named):
        load_network(folder)
