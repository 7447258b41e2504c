"""A network of the user's own, from its files to SEG, NIfTI and volumes."""

import csv
import json
import os
import pickle
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medical import own_networks
from medical.own_networks import POST, PRE, Blobs, extra, write_beside, write_bundle, write_script
from torch import nn

from plinth.engine import Engine, ModelError
from plinth.verticals.medical import CtAnalysis, CtSettings
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.networks.load import load_network
from plinth.verticals.medical.networks.prepare import prepare
from plinth.verticals.medical.networks.recipe import Crop, Orient, Pad, Recipe, Space, Window
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chest, as DICOM."""
    folder = tmp_path_factory.mktemp("study")
    write_series(Phantom(shape=(72, 64, 20), spacing=(5.0, 5.0, 8.0)), folder)
    return folder


def analysed(study: Path, model: Path, out: Path, **options: object) -> dict:
    """Analyse a study with a network through an engine; the report, and files in ``out``."""
    vertical = CtAnalysis(CtSettings(network={"model": model, **options}))
    with Engine(threads=1) as engine:
        for one in vertical.models():
            engine.add(one, batch_range=vertical.batch_range)
        (item,) = vertical.discover(study)
        result = engine.run(vertical.infer([vertical.load(item)])).value[0]
    if isinstance(result, Exception):
        raise result
    vertical.write(result, out)
    return json.loads((out / "report.json").read_text())


def labels_of(out: Path) -> np.ndarray:
    """(z, y, x) of the NIfTI file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(out / "segmentation.nii.gz")))


def dice(ours: np.ndarray, theirs: np.ndarray, label: int) -> float:
    a, b = ours == label, theirs == label
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def monai_says(study: Path, network: nn.Module) -> np.ndarray:
    """The labels (z, y, x) that MONAI itself makes of the same voxels, by its own transforms."""
    from monai.data import MetaTensor
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import (
        AsDiscreted,
        Compose,
        Invertd,
        Orientationd,
        ScaleIntensityRanged,
        Spacingd,
    )

    volume = load_volume(study)
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image = MetaTensor(
        torch.from_numpy(volume.voxels.astype(np.float32).transpose(2, 1, 0).copy())[None],
        affine=torch.from_numpy(ras),
    )
    before = Compose(
        [
            Orientationd("image", axcodes="RAS"),
            Spacingd("image", pixdim=(4.0, 4.0, 6.0), mode="bilinear"),
            ScaleIntensityRanged("image", -1000, 400, 0.0, 1.0, clip=True),
        ]
    )
    data = before({"image": image})
    with torch.inference_mode():
        inferer = SlidingWindowInferer(own_networks.PATCH, 4, 0.5, mode="gaussian")
        logits = inferer(data["image"][None], network)[0]
    data["pred"] = MetaTensor(logits.softmax(0), meta=data["image"].meta)
    data["pred"].applied_operations = data["image"].applied_operations
    after = Compose(
        [
            Invertd("pred", before, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True),
        ]
    )
    return after(data)["pred"][0].numpy().transpose(2, 1, 0).astype(np.uint8)


@pytest.mark.filterwarnings("ignore")  # MONAI's own
@pytest.mark.parametrize(
    "kind", ["safetensors", pytest.param("TorchScript", marks=pytest.mark.soak)]
)
def test_a_monai_bundle_gives_what_monai_gives(kind, study, tmp_path):
    extra("monai")
    network = own_networks.unet() if kind == "safetensors" else Blobs().eval()
    bundle = write_bundle(tmp_path / "b", None if kind == "safetensors" else network)
    report = analysed(study, bundle, tmp_path)
    ours, theirs = labels_of(tmp_path), monai_says(study, network)
    assert ours.shape == theirs.shape
    for label in np.unique(theirs):
        assert dice(ours, theirs, label) >= 0.999, label
    assert len(np.unique(theirs)) > 1
    assert report["plan"]["network"] == "MONAI bundle"
    assert report["network"]["name"] == "b"


def test_what_is_written_agrees_with_itself_and_lies_on_the_source(study, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    bundle = write_bundle(tmp_path / "b", Blobs())
    report = analysed(study, bundle, tmp_path, uncertainty=True, flips=True)
    labels, volume = labels_of(tmp_path), load_volume(study)
    assert labels.shape == volume.shape
    seg = highdicom.seg.segread(tmp_path / "segmentation.dcm")
    table = (tmp_path / "volumes.csv").read_text().splitlines()
    rows = {row["name"]: row for row in csv.DictReader(table)}
    for value, name in ((1, "spleen"), (2, "liver")):
        found = next(f for f in report["findings"] if f["key"] == f"label_{value}_volume")
        voxels = int((labels == value).sum())
        assert int(rows[name]["voxels"]) == voxels
        if voxels:
            ml = voxels * volume.voxel_volume_mm3 / 1000
            assert found["value"] == pytest.approx(ml, abs=0.01)
            number = next(
                s.segment_number
                for s in (seg.get_segment_description(n) for n in seg.segment_numbers)
                if s.segment_label == name
            )
            planes = seg.get_volume(segment_numbers=[number], combine_segments=True).array
            assert int((planes > 0).sum()) == voxels
        else:
            assert found["value"] is None
    image = sitk.ReadImage(str(tmp_path / "segmentation.nii.gz"))
    np.testing.assert_allclose(image.GetOrigin(), volume.affine[:3, 3], atol=1e-3)
    np.testing.assert_allclose(image.GetSpacing(), volume.spacing, rtol=1e-4)
    content = highdicom.sr.srread(tmp_path / "measurements.dcm").content
    groups = {g.tracking_identifier: g for g in content.get_volumetric_roi_measurement_groups()}
    assert set(groups) == {one["title"] for one in report["structures"].values()} != set()
    for one in report["structures"].values():
        read = {m.name.value: m.value for m in groups[one["title"]].get_measurements()}
        assert read["RNU0"] == one["mesh_volume_ml"] == float(rows[one["title"]]["mesh_volume_ml"])
        assert read["Q4LE"] == one["values"]["mean"] == float(rows[one["title"]]["mean"])
    doubt = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "uncertainty.nii.gz")))
    assert doubt.shape == labels.shape
    assert doubt.max() > 0
    assert report["plan"]["flips"] == 8
    page = (tmp_path / "report.html").read_text()
    assert "spleen" in page
    assert "Research use only" in page


@pytest.fixture(scope="module")
def in_a_bundle(study: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The labels (z, y, x) that the network of the tests gives from a MONAI bundle."""
    out = tmp_path_factory.mktemp("bundle")
    analysed(study, write_bundle(out / "b", Blobs().eval()), out)
    return labels_of(out)


@pytest.mark.parametrize("kind", [".ts", pytest.param(".pt2", marks=pytest.mark.soak), ".onnx"])
def test_a_file_with_its_json_gives_what_the_same_network_gives_in_a_bundle(
    kind, study, in_a_bundle, tmp_path
):
    path, network = write_beside(tmp_path / f"blobs{kind}"), Blobs().eval()
    example = torch.rand(2, 1, *own_networks.PATCH)
    rows = torch.export.Dim("n", min=1, max=64)
    if kind == ".ts":
        write_script(network, path)
    elif kind == ".pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=({0: rows},))
        torch.export.save(program, path)
    else:
        _onnx(network, example, path)
    analysed(study, path, tmp_path)
    for label in np.unique(in_a_bundle):
        assert dice(labels_of(tmp_path), in_a_bundle, label) >= 0.999


def _onnx(
    network: nn.Module, example: torch.Tensor, path: Path, *, rows: int | None = None
) -> None:
    free = torch.export.Dim("n", min=1, max=64)
    torch.onnx.export(
        network.eval(),
        (example,),
        str(path),
        input_names=["volume"],
        dynamic_shapes=({0: free},) if rows is None else None,
        external_data=False,
        verbose=False,
    )


class Squeezed(nn.Module):
    """Channels weighed by what a window holds, with the number of rows in its views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.weigh = nn.Conv3d(1, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, z, y, x) to (n, 3, z, y, x)."""
        seen, rows = self.body(volume), volume.shape[0]
        weights = self.weigh(seen.mean((2, 3, 4)).view(rows, 3))
        return seen * weights.view(rows, 3, 1, 1, 1)


class Pair(nn.Module):
    """Two outputs, the classes last; the type of the input is free."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Blobs().body

    def forward(self, volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, 1, z, y, x) to (n, 6, z, y, x) and (n, 3, z, y, x)."""
        seen = self.body[0](volume.float())
        return seen, self.body[1:](seen)


WINDOW = torch.rand(1, 1, *own_networks.PATCH)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_file_that_takes_one_row_gives_what_its_network_gives(kind, tmp_path):
    """As torch exports it, unless it is told that the number of rows is free."""
    path, network = write_beside(tmp_path / f"one.{kind}"), Squeezed().eval()
    if kind == "pt2":
        torch.export.save(torch.export.export(network, (WINDOW,)), path)
    else:
        _onnx(network, WINDOW, path, rows=1)
    rows = torch.rand(3, 1, *own_networks.PATCH)
    with torch.no_grad():
        assert torch.allclose(load_network(path).model.module(rows), network(rows), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "example", "changed", "said"),
    [
        ("pt2", WINDOW, {"window": {"size": [24, 32, 16]}}, "asks for windows of [24, 32, 16]"),
        ("onnx", WINDOW, {"window": {}}, "asks for whole volumes"),
        (
            "onnx",
            WINDOW,
            {"window": {"size": [32, 32, 16], "halo": [1, 1, 1]}},
            "windows have any size",
        ),
        ("pt2", torch.cat([WINDOW, WINDOW]), {}, "takes 2 rows at once"),
        ("onnx", torch.cat([WINDOW, WINDOW]), {}, "fixed to 2 rows"),
        ("onnx", WINDOW.half(), {}, "float16, expected float32"),
        ("onnx", WINDOW.movedim(1, 4), {}, "(32, 32, 16, 1) float32, expected one channel"),
        ("onnx", WINDOW, {"channels": None}, "which of them has the classes is not said"),
        ("pt2", WINDOW, {"channels": None}, "which of them has the classes is not said"),
        ("onnx", WINDOW, {"output": 2}, "has no output 2"),
    ],
)
def test_a_file_that_takes_or_gives_something_else_is_refused(
    kind, example, changed, said, tmp_path
):
    path = write_beside(tmp_path / f"other.{kind}", **changed)
    network = Pair().eval() if example.shape[1] == 1 else nn.Conv3d(32, 3, 1)
    if kind == "pt2":
        torch.export.save(torch.export.export(network, (example,)), path)
    else:
        _onnx(network, example, path, rows=1)
    with pytest.raises(ModelError, match=re.escape(said)):
        load_network(path).model.module(WINDOW)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("changed", [{"output": 1}, {"channels": 6}])
def test_one_of_several_outputs_is_taken(kind, changed, tmp_path):
    path, network = write_beside(tmp_path / f"pair.{kind}", **changed), Pair().eval()
    if kind == "pt2":
        torch.export.save(torch.export.export(network, (WINDOW,)), path)
    else:
        _onnx(network, WINDOW, path, rows=1)
    with torch.no_grad():
        expected = network(WINDOW)["output" in changed]
        assert torch.allclose(load_network(path).model.module(WINDOW), expected, atol=1e-5)


class Labels(nn.Module):
    """The class of each voxel, by what lies up to two voxels around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Blobs().body

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, z, y, x) to (n, 1, z, y, x)."""
        return self.body(volume).argmax(1, keepdim=True)


def test_labels_that_cannot_be_blended_are_cut_where_windows_overlap(study, tmp_path):
    """At the end of a window a network sees what is not there."""
    found = []
    for name, window in (("whole", {}), ("cut", {"size": [16, 16, 16], "overlap": 0.5})):
        path = tmp_path / f"{name}.ts"
        write_beside(path, window=window, reduce="labels", channels=1, activation="none")
        write_script(Labels(), path, trace=False)
        analysed(study, path, tmp_path)
        found.append(labels_of(tmp_path))
    assert len(np.unique(found[0])) > 1
    assert np.array_equal(*found)


class Opens:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


def test_weights_that_would_run_code_are_refused_and_not_run(tmp_path):
    extra("monai")
    bundle = write_bundle(tmp_path / "b")
    (bundle / "models" / "model.safetensors").unlink()
    torch.save({"state_dict": Opens(tmp_path / "ran")}, bundle / "models" / "model.pt")
    with pytest.raises(ModelError, match="would run code"):
        load_network(bundle)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"spacing": "$__import__('os').system('true')"}, "__import__"),
        (
            {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": "$[x for x in (1,)]"}},
            "roi",
        ),
        ({"preprocessing": {"transforms": [*PRE, {"_target_": "RandAffined"}]}}, "RandAffined"),
        ({"preprocessing": {"transforms": [*PRE, {"_target_": "os.system"}]}}, "os.system"),
        ({"postprocessing": {"transforms": [*POST, {"_target_": "Lambdad"}]}}, "Lambdad"),
        ({"spacing": "@spacing"}, "itself"),
        ({"inferer": {"_target_": "builtins.exec"}}, "exec"),
    ],
)
def test_what_a_bundle_would_have_executed_is_refused_by_its_name(changed, named, tmp_path):
    bundle = write_bundle(tmp_path / "b", Blobs(), **changed)
    with pytest.raises(ModelError, match=named):
        load_network(bundle)


@pytest.mark.parametrize(
    ("named", "read"),
    [
        ("$@bundle_root + '/models/model.pt'", True),
        ("$str(@bundle_root) + '/models/model.ts'", True),
        ("./models/model.safetensors", True),
        ("$@bundle_root + '/models/model_v2.pt'", False),
        ("$@bundle_root + '/../models/model.pt'", False),
        ("/data/best/model.pt", False),
        ("$[@bundle_root + '/models/fold' + str(n) + '.pt' for n in (0, 1)]", False),
    ],
)
def test_a_bundle_never_runs_with_other_weights_than_its_config_names(named, read, tmp_path):
    loader = {"_target_": "CheckpointLoader", "load_path": named}
    bundle = write_bundle(tmp_path / "b", Blobs(), checkpointloader=loader)
    if read:
        load_network(bundle)
    else:
        with pytest.raises(ModelError, match="names the weights"):
            load_network(bundle)


ORIENT = {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}
SPACE = {"_target_": "Spacingd", "keys": "image", "pixdim": [4, 4, 6], "mode": "bilinear"}
TURNED = {"_target_": "NibabelReader", "as_closest_canonical": True, "affine_lps_to_ras": False}
LOAD = {"_target_": "LoadImaged", "keys": "image"}
TYPE = {"_target_": "EnsureTyped", "keys": "image"}
INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing"}
CROP = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
SLIDE = {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 16], "mode": "gaussian"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"preprocessing": {"transforms": [ORIENT | {"labels": ["RL", "AP", "IS"]}]}}, "labels"),
        ({"preprocessing": {"transforms": [SPACE | {"align_corners": True}]}}, "align_corners"),
        ({"preprocessing": {"transforms": [SPACE | {"padding_mode": "zeros"}]}}, "padding_mode"),
        ({"preprocessing": {"transforms": [SPACE | {"min_pixdim": [1, 1, 1]}]}}, "min_pixdim"),
        ({"preprocessing": {"transforms": [*PRE, ORIENT | {"keys": "label"}]}}, "takes label"),
        ({"preprocessing": {"transforms": [LOAD | {"reverse_indexing": True}]}}, "reverse"),
        ({"preprocessing": {"transforms": [LOAD | {"reader": TURNED}]}}, "affine_lps_to_ras"),
        (
            {"preprocessing": {"transforms": [LOAD | {"reader": "$R(reverse_indexing=True)"}]}},
            "not executed",
        ),
        ({"preprocessing": None}, "no preprocessing: what is done to an image before"),
        ({"postprocessing": None}, "no postprocessing: what is done to the output"),
        ({"preprocessing": {"_target_": "monai.transforms.OneOf", "transforms": []}}, "OneOf"),
        ({"inferer": SLIDE | {"roi_size": [96, 96, -1]}}, "whole image along some axes"),
        ({"preprocessing": {"transforms": [*PRE, TYPE | {"dtype": "$torch.uint8"}]}}, "uint8"),
        ({"preprocessing": {"transforms": [CROP | {"mode": "reflect"}]}}, "mode"),
        ({"inferer": SLIDE | {"sigma_scale": 0.25}}, "sigma_scale"),
        ({"inferer": SLIDE | {"padding_mode": "reflect"}}, "padding_mode"),
    ],
)
def test_options_that_would_change_the_result_are_never_passed_over(changed, named, tmp_path):
    bundle = write_bundle(tmp_path / "b", Blobs(), **changed)
    with pytest.raises(ModelError, match=named):
        load_network(bundle)


def test_options_that_change_nothing_are_no_obstacle(tmp_path):
    steps = [
        ORIENT | {"labels": [["L", "R"], ["P", "A"], ["I", "S"]], "image_only": True},
        SPACE | {"padding_mode": "border", "align_corners": False, "dtype": "$None"},
    ]
    inferer = SLIDE | {"sigma_scale": 0.125, "cval": 0.0, "progress": True, "sw_device": "@device"}
    changed = {"preprocessing": {"transforms": steps}, "inferer": inferer}
    assert load_network(write_bundle(tmp_path / "b", Blobs(), **changed)).recipe.steps


@pytest.mark.parametrize(
    "beyond", [{}, {"padding_mode": "replicate"}, {"padding_mode": "constant", "cval": -1.0}]
)
def test_a_volume_smaller_than_a_window_is_padded_as_monai_does(beyond, study, tmp_path):
    from monai.inferers import sliding_window_inference

    changed = {
        "preprocessing": {"transforms": [ORIENT, SPACE]},
        "inferer": SLIDE | beyond | {"roi_size": [200, 200, 200]},
    }
    network = load_network(write_bundle(tmp_path / "b", Blobs(), **changed))
    window = network.recipe.window
    small = network.recipe.model_copy(
        update={"window": window.model_copy(update={"size": (1, 1, 1)})}
    )
    volume = load_volume(study)
    rows, seen = prepare(volume, small).rows, []
    sliding_window_inference(
        rows[None], 200, 1, lambda given: seen.append(given) or given, **beyond
    )
    assert torch.equal(prepare(volume, network.recipe).rows, seen[0][0])


@pytest.mark.filterwarnings("ignore")  # MONAI's own
@pytest.mark.parametrize(
    ("options", "monai"),
    [
        ({"margin": [1, 3, 2]}, None),
        ({"margin": 4, "k_divisible": [8, 4, 1]}, "1.5.1"),
        ({"margin": 4, "allow_smaller": True, "k_divisible": 8}, "1.5.1"),
        ({"margin": 4}, "1.3.0"),  # which still cut a margin off at the border
    ],
)
def test_a_foreground_is_cropped_as_monai_does(options, monai, tmp_path):
    extra("monai")
    from monai.transforms import CropForeground

    bundle = write_bundle(
        tmp_path / "b", Blobs(), preprocessing={"transforms": [CROP | options]}, inferer=None
    )
    if monai is not None:
        path = bundle / "configs" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"monai_version": monai}))
    volume = _blocks([0, 1, 2], (1, 1, 1))
    volume.voxels[0, 9, 13] = 7  # the foreground reaches the border
    rows = torch.from_numpy(volume.voxels.transpose(2, 1, 0).copy())[None]
    wanted = options | ({"allow_smaller": True} if monai == "1.3.0" else {})
    theirs = CropForeground(**wanted)(rows)
    assert torch.equal(prepare(volume, load_network(bundle).recipe).rows, theirs)


@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_half_a_voxel_more_or_less_is_as_many_voxels_as_monai_has(tmp_path):
    extra("monai")
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    volume = _blocks([0, 1, 2], (1, 1, 1))  # 14 x 10 x 12 voxels of 1.5 x 2 x 2.5 mm
    mm = (1.5, 4.0, 2.0)  # 9 steps of 2 mm are 4.5 of 4 mm
    bundle = write_bundle(
        tmp_path / "b",
        Blobs(),
        preprocessing={"transforms": [SPACE | {"pixdim": mm}]},
        inferer=None,
    )
    rows = torch.from_numpy(volume.voxels.transpose(2, 1, 0).copy())[None]
    theirs = Spacing(mm)(MetaTensor(rows, affine=torch.from_numpy(volume.affine)))
    ours = prepare(volume, load_network(bundle).recipe).rows
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs.as_tensor().float(), atol=1e-3)


@pytest.mark.parametrize("one", ["b_min", "b_max"])
def test_a_range_with_one_end_is_clipped_there_alone(one, tmp_path):
    extra("monai")
    from monai.transforms import ScaleIntensityRange

    ends = {"b_min": None, "b_max": None, one: {"b_min": 0.0, "b_max": 1.0}[one]}
    scale = {"_target_": "ScaleIntensityRanged", "keys": "image", "clip": True} | ends
    bundle = write_bundle(
        tmp_path / "b",
        Blobs(),
        preprocessing={"transforms": [scale | {"a_min": 50, "a_max": 150}]},
        inferer=None,
    )
    volume = _blocks([0, 1, 2], (1, 1, 1))
    rows = torch.from_numpy(volume.voxels.transpose(2, 1, 0).copy())[None]
    theirs = ScaleIntensityRange(50, 150, clip=True, **ends)(rows)
    assert torch.allclose(prepare(volume, load_network(bundle).recipe).rows, theirs)


def test_what_a_bundle_says_twice_and_of_its_reader_is_taken(tmp_path):
    largest = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}
    bundle = write_bundle(
        tmp_path / "b",
        Blobs(),
        preprocessing={"transforms": [LOAD | {"reader": TURNED | {"affine_lps_to_ras": True}}]},
        postprocessing={
            "transforms": [
                *POST,
                largest | {"applied_labels": [1]},
                largest | {"applied_labels": 2},
            ]
        },
        inferer=SLIDE | {"roi_size": -1},
    )
    recipe = load_network(bundle).recipe
    assert recipe.largest == (1, 2)
    assert recipe.steps == (Orient(codes="RAS"),)
    assert recipe.window.size is None


@pytest.mark.parametrize(
    ("post", "back"),
    [
        (POST, "linear"),  # with nearest_interp false
        ([INVERT | {"nearest_interp": True}], "nearest"),
        ([INVERT], "nearest"),  # MONAI's default
        ([POST[0], POST[2], INVERT | {"nearest_interp": False}], "nearest"),  # labels go back
        ([INVERT | {"nearest_interp": False}, POST[0], POST[2]], "raw"),  # activated afterwards
    ],
)
def test_outputs_go_back_to_the_images_as_the_bundle_says(post, back, tmp_path):
    bundle = write_bundle(tmp_path / "b", Blobs(), postprocessing={"transforms": post})
    assert load_network(bundle).recipe.back == back


def test_torchscript_that_touches_files_is_refused_before_it_is_loaded(tmp_path):
    class Reads(nn.Module):
        def forward(self, volume: torch.Tensor) -> torch.Tensor:
            return volume + torch.from_file("/etc/hostname", False, 1)

    path = write_beside(tmp_path / "reads.ts")
    write_script(Reads(), path, trace=False)
    with pytest.raises(ModelError, match="from_file"):
        load_network(path)


class Dropping(nn.Module):
    """Drops values at random, while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Conv3d(1, 3, 1), nn.Dropout3d(0.5), nn.Conv3d(3, 2, 1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.first(volume))))


class Normed(Dropping):
    """Normalises by what it has learned, unless it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.BatchNorm3d(3)


def onnx_of(module: nn.Module, path: Path) -> None:
    """The middle of a network as a graph of its own, in the mode that it is in."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    floats = [helper.make_tensor(name, kinds.FLOAT, [1], [1.0]) for name in "abcd"]
    mode = helper.make_tensor("mode", kinds.BOOL, [], [module.training])
    ratio = helper.make_tensor("ratio", kinds.FLOAT, [], [0.5])
    if isinstance(module, Normed):
        training = int(module.training)
        outputs = ["y", "mean", "deviation"] if training else ["y"]
        node = helper.make_node(
            "BatchNormalization", ["volume", *"abcd"], outputs, training_mode=training
        )
    else:
        node = helper.make_node("Dropout", ["volume", "ratio", "mode"], ["y"])
    shape = ["n", 1, 16, 16, 16]
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, shape) for name in ("volume", "y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [*floats, mode, ratio])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


@pytest.mark.parametrize("kind", ["ts", "pt2", "onnx"])
@pytest.mark.parametrize(("made", "why"), [(Dropping, "at random"), (Normed, "has learned")])
def test_a_network_that_was_saved_in_training_mode_is_refused(kind, made, why, tmp_path):
    def load(training: bool) -> None:
        window = {"size": [16, 16, 16]}
        path = write_beside(tmp_path / f"net.{kind}", window=window)
        module, rows = made().train(training), torch.rand(1, 1, 16, 16, 16)
        if kind == "onnx":
            onnx_of(module, path)
        elif kind == "pt2":
            torch.export.save(torch.export.export(module, (rows,)), path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.trace(module, rows, check_trace=False).save(path)
        load_network(path)

    load(training=False)
    with pytest.raises(ModelError, match=why):
        load(training=True)


def test_an_exported_program_whose_example_would_run_code_does_not_run_it(tmp_path):
    path = write_beside(tmp_path / "blobs.pt2")
    torch.export.save(torch.export.export(Blobs(), (torch.rand(1, 1, 8, 8, 8),)), path)
    changed = write_beside(tmp_path / "changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if "sample_inputs" in name:
                data = pickle.dumps(Opens(tmp_path / "ran"))
            target.writestr(name, data)
    with suppress(ModelError):
        load_network(changed)
    assert not (tmp_path / "ran").exists()


def test_a_file_without_its_json_says_what_to_write(tmp_path):
    path = tmp_path / "blobs.ts"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"no blobs\.json beside it"):
        load_network(path)
    with pytest.raises(ModelError, match="no network at"):
        load_network(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["plans.json", "model.json", "configs/metadata.json", "net.json"])
def test_a_text_beside_a_network_is_bounded_and_refused_by_its_name(name, tmp_path):
    for other in ("plans.json", "dataset.json") if name == "plans.json" else ():
        (tmp_path / other).write_text("{}")
    (tmp_path / "net.ts").write_bytes(b"")
    text = tmp_path / name
    text.parent.mkdir(exist_ok=True)
    path = tmp_path / "net.ts" if name == "net.json" else tmp_path
    text.write_text("[" * 200_000)
    with pytest.raises(ModelError, match=re.escape(text.name)):
        load_network(path)
    os.truncate(text, 64 << 30)
    with pytest.raises(ModelError, match=re.escape(text.name) + r" is larger than [\d,]+ bytes"):
        load_network(path)


codes = st.permutations(["RL", "AP", "SI"]).flatmap(
    lambda pairs: st.tuples(*(st.sampled_from(pair) for pair in pairs)).map("".join)
)


@settings(max_examples=60)
@given(
    codes,
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    st.sampled_from([(0.0, 0.0, 0.0), (1.5, 2.5, 2.0)]),
    st.booleans(),
)
def test_labels_come_back_to_where_their_voxels_were(code, order, signs, mm, crop):
    """Whatever way the slices were cut and the network wants them."""
    volume = _blocks(order, signs)
    steps = [Orient(codes=code)]
    if crop:
        steps.append(Crop())
    if any(mm):
        steps.append(Space(mm=mm))
    recipe = Recipe(
        name="x", labels={1: "a"}, steps=(*steps, Pad(multiple=(4, 4, 4))), window=Window()
    )
    ready = prepare(volume, recipe)
    labels = ready.rows[0].round().clamp(0, 255).to(torch.uint8).numpy()
    back = ready.to_native(ready.nearest(labels))
    same = (back == volume.voxels).mean()
    assert same == 1.0 if not any(mm) else same > 0.7


def _exported(path: Path, network: nn.Module, **changed: object) -> Path:
    program = torch.export.export(network.eval(), (torch.rand(1, 1, *own_networks.PATCH),))
    torch.export.save(program, path)
    return write_beside(path, **changed)


class Levels(nn.Module):
    """Channel n is high where the brightness is above its level."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels).view(1, -1, 1, 1, 1))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return 50 * (volume - self.levels)


def test_a_structure_of_which_a_later_one_takes_a_part_is_not_measured_as_whole(study, tmp_path):
    labels = {"1": "core", "2": "whole"}
    how = {"reduce": "threshold", "activation": "sigmoid", "channels": 2, "labels": labels}
    path = _exported(tmp_path / "nested.pt2", Levels((0.8, 0.5)), **how)
    report = analysed(study, path, tmp_path)
    titles = [one["title"] for one in report["findings"]]
    assert titles == ["core, rest, volume", "whole, volume"]
    assert any(said.startswith("100.0 % of core is also of") for said in report["warnings"])


def test_labels_that_nothing_names_and_labels_that_are_everywhere_are_said(study, tmp_path):
    how = {"labels": {"1": "first"}, "channels": None}
    path = _exported(tmp_path / "bare.pt2", Levels((0.5, -9.0, 0.6)), **how)
    report = analysed(study, path, tmp_path)
    told = " ".join(report["warnings"])
    assert "does not name" not in told
    assert "first fills the field of view" in told
    path = _exported(tmp_path / "other.pt2", Levels((0.5, 0.9, -9.0)), **how)
    told = " ".join(analysed(study, path, tmp_path)["warnings"])
    assert "does not name (2)" in told


def test_names_of_labels_are_such_as_every_output_can_hold_and_tell_apart():
    names = {0: "air", 1: "lesion", 2: " lesion\n", 3: "a\\b", 4: "L\u00e4sion"}
    assert Recipe(name="x", labels=names).labels == {
        1: "lesion (1)", 2: "lesion (2)", 3: "a b", 4: "L\u00e4sion",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"labels": {1: "a", 3: "b"}, "channels": 3}, "label 3"),
        ({"labels": {1: "a"}, "channels": 1}, "threshold"),
        ({"labels": {3: "a"}, "channels": 2, "reduce": "threshold"}, "label 3"),
    ],
)
def test_a_label_that_no_channel_gives_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", **how)


def _blocks(order: list[int], signs: tuple[float, ...]) -> Volume:
    """A volume of three bright blocks with axes in any order and sense."""
    voxels = np.zeros((12, 10, 14), np.float32)
    voxels[2:7, 3:9, 1:5], voxels[7:11, 1:4, 6:13], voxels[4:6, 5:8, 9:12] = 60, 120, 200
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(order)] * np.array(signs) * np.array([1.5, 2.0, 2.5])
    facts = SeriesFacts("blocks", "CT", "", 10, 14, (1.5, 2.0, 2.5), 12, units="HU")
    return Volume(voxels, affine, Verdict(), facts)


def test_another_modality_is_refused_with_the_reason(study, tmp_path):
    path = write_beside(tmp_path / "blobs.ts", modality=["MR"])
    write_script(Blobs(), path)
    vertical = CtAnalysis(CtSettings(network={"model": path}))
    with pytest.raises(Exception, match="not MR"):
        list(vertical.discover(study))
