"""CT analysis as a vertical: the contract, the folder door, real studies, and memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from medical.chests import chest, dicom_of
from medical.own_networks import Blobs, write_beside, write_script
from pydantic import ValidationError

from plinth.engine import Call, Compute, Engine, InputError, ModelStore
from plinth.pipelines.folders.batch import Batch
from plinth.verticals.contract import Item, LeftOut, WithArtefacts
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.vertical import MODEL, STORE, CtAnalysis, CtSettings, StudyRequest
from plinth.verticals.testing import check_vertical, feed
from plinth.verticals.testing.flows import run_with_models

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from dicom_series import SERIES, Told, told_of

pytestmark = pytest.mark.slow
SMALL = {"shape": (76, 64, 20), "spacing": (4.6, 4.5, 4.5)}
Edit = Callable[..., None]


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A small slab of a chest as DICOM."""
    dicom_of(Phantom(**SMALL), tmp_path / "chest")  # type: ignore[arg-type]
    return tmp_path / "chest"


def refused(vertical: CtAnalysis, folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        vertical.load(next(vertical.discover(folder)))
    return caught.value


# -- the contract --------------------------------------------------------------------------------
def test_it_conforms(series: Path) -> None:
    vertical = CtAnalysis(CtSettings(nodules=True, working_spacing_mm=3))
    another = StudyRequest(chest(**{**SMALL, "seed": 3, "noise_hu": 30.0}))
    check_vertical(vertical, [another], folder=series.parent).raise_if_failed()


def test_a_folder_is_read_in_one_heavy_step_that_another_process_may_run(series: Path) -> None:
    vertical = CtAnalysis()
    told = list(vertical.survey(series))
    flow = vertical.surveying(series)
    step = next(flow)
    assert isinstance(step, Compute)
    carried = pickle.loads(pickle.dumps(step))  # noqa: S301 - our own
    with pytest.raises(StopIteration) as ended:
        flow.send(pickle.loads(pickle.dumps(carried.run())))  # noqa: S301 - our own
    assert ended.value.value == told
    assert [type(one) for one in told] == [LeftOut, Item]  # truth.json is no image


def test_another_process_need_not_find_a_series_again(series: Path) -> None:
    here, there = CtAnalysis(), CtAnalysis()
    (item,) = here.discover(series)
    known = pickle.loads(pickle.dumps(here.hand_over(item)))  # noqa: S301 - our own
    assert here.hand_over(item) is None
    there.take_over(item, known)
    step = next(there.loading(item))
    assert isinstance(step, Compute)
    assert step.arguments[0] is known
    assert known.id == item.id


@pytest.mark.soak
def test_one_study_is_two_calls_and_no_loop_over_windows() -> None:
    vertical, calls = CtAnalysis(CtSettings(nodules=True)), list[Call]()
    scan = chest(shape=(90, 70, 54), spacing=(3.9, 3.9, 4.0))
    (result,) = run_with_models(vertical, [StudyRequest(scan)], on_call=calls.append)
    report = result.response
    volume, look = calls
    assert volume.model == look.model == MODEL
    assert volume.tiling is not None
    assert volume.tiling.window == vertical.settings.window
    assert look.tiling is None
    model = ModelStore(STORE).load(MODEL)
    assert (report.network.version, report.network.digest) == (model.spec.version, model.digest())
    assert report.network.metrics == model.spec.metrics


def test_a_bad_study_does_not_take_its_neighbours_along() -> None:
    good, bad = chest(**SMALL), chest(**{**SMALL, "shape": (76, 64, 5)})
    vertical = CtAnalysis(CtSettings(nodules=False))
    first, second, third = feed(vertical.infer([StudyRequest(v) for v in (good, bad, good)]))
    assert isinstance(second, InputError)
    assert second.reason == "too_thin"
    assert isinstance(first, WithArtefacts)
    assert isinstance(third, WithArtefacts)
    assert first.response.findings == third.response.findings


# -- settings ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"window": (30, 48, 48)},
        {"window": (8, 48, 48)},
        {"overlap": 1.0},
        {"gaps": "ignore"},
        {"min_confidence": 2},
        {"windows": (32, 48, 48)},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CtSettings(**wrong)  # type: ignore[arg-type]


def test_without_nodules_no_model_is_needed(tmp_path: Path) -> None:
    vertical = CtAnalysis(CtSettings(nodules=False, store=tmp_path))
    assert vertical.models() == []
    (result,) = feed(vertical.infer([StudyRequest(chest(**SMALL))]))
    assert isinstance(result, WithArtefacts)
    assert (result.response.nodules, result.response.network) == (None, None)


# -- folders -----------------------------------------------------------------------------------
def test_series_that_are_not_ct_are_left_out_with_their_reason(series: Path, edit: Edit) -> None:
    dicom_of(Phantom(**{**SMALL, "seed": 8}), series.parent / "mr")  # type: ignore[arg-type]
    edit(series.parent / "mr", lambda image, k: setattr(image, "Modality", "MR"))
    found = list(CtAnalysis().survey(series.parent))
    (item,) = (one for one in found if isinstance(one, Item))
    assert item.facts["images"] == 20
    (mr,) = (one for one in found if isinstance(one, LeftOut) and one.reason == "other_modality")
    assert (mr.path, mr.files, mr.message) == (series.parent / "mr", 20, "not CT")
    assert [one.id for one in CtAnalysis().discover(series.parent)] == [item.id]


def test_every_file_of_a_folder_is_an_item_or_left_out_once(series: Path, edit: Edit) -> None:
    root = series.parent
    dicom_of(Phantom(**{**SMALL, "seed": 8}), root / "mr")  # type: ignore[arg-type]
    edit(root / "mr", lambda image, k: setattr(image, "Modality", "MR"))
    (root / "torn.dcm").write_bytes((root / "mr" / "slice_0001.dcm").read_bytes()[:500])
    (root / "notes.txt").write_text("x" * 200)
    (root / "nowhere").symlink_to(root / "absent")
    found = list(CtAnalysis().survey(root))
    counts = [len(one.paths) if isinstance(one, Item) else one.files for one in found]
    links = sum(path.is_symlink() for path in root.rglob("*"))
    assert sum(counts) == sum(path.is_file() for path in root.rglob("*")) + links
    reasons = {one.path.name: one for one in found if isinstance(one, LeftOut)}
    assert reasons["torn.dcm"].failed
    assert reasons["notes.txt"].reason == "not_dicom"
    assert reasons["nowhere"].reason == "not_a_file"


def test_burned_in_text_is_left_out_unless_it_is_wanted(series: Path, edit: Edit) -> None:
    dicom_of(Phantom(**{**SMALL, "seed": 8}), series.parent / "b")  # type: ignore[arg-type]
    edit(series.parent / "b", lambda image, k: setattr(image, "BurnedInAnnotation", "YES"))
    told = [one for one in CtAnalysis().survey(series.parent) if isinstance(one, LeftOut)]
    assert [one.path.name for one in told if one.reason == "burned_in"] == ["b"]
    anyway = CtAnalysis(CtSettings(burned_in="analyse"))
    assert len(list(anyway.discover(series.parent))) == 2


def test_a_folder_without_ct_is_refused_with_its_contents(series: Path, edit: Edit) -> None:
    edit(series, lambda image, k: setattr(image, "Modality", "MR"))
    error = refused(CtAnalysis(), series)
    assert error.reason == "no_ct"
    assert "MR" in str(error)


def test_an_item_is_loaded_by_another_process_too(series: Path) -> None:
    """A resumed batch has the item and a fresh vertical that never discovered it."""
    (item,) = CtAnalysis().discover(series.parent)
    request = CtAnalysis().load(item)
    assert request.volume.shape == (20, 64, 76)


def test_gaps_are_refused_or_filled_as_set(series: Path) -> None:
    (series / "slice_0009.dcm").unlink()
    assert refused(CtAnalysis(), series).reason == "geometry_gap"
    filling = CtAnalysis(CtSettings(gaps="fill", nodules=False))
    (item,) = filling.discover(series)
    (result,) = feed(filling.infer([filling.load(item)]))
    assert isinstance(result, WithArtefacts)
    report = result.response
    assert report.geometry["status"] == "gaps_filled"
    assert any("gap" in warning or "missing" in warning for warning in report.warnings)


def test_strict_refuses_what_was_repaired(tmp_path: Path) -> None:
    dicom_of(Phantom(**{**SMALL, "tilt": 15.0}), tmp_path)  # type: ignore[arg-type]
    assert refused(CtAnalysis(CtSettings(strict=True)), tmp_path).reason == "geometry_tilt"


# -- a network of one's own --------------------------------------------------------------------
def test_weights_are_read_once_for_all_studies(tmp_path: Path) -> None:
    """Once the models are there, the network's files may be gone."""
    steps = [{"op": "orient", "codes": "RAS"}, {"op": "space", "mm": [9.0, 9.0, 10.0]}]
    model = write_beside(tmp_path / "blobs.ts", steps=steps)
    write_script(Blobs(), model)
    for seed in (1, 2):
        thin = Phantom(shape=(32, 32, 12), spacing=(11.0, 11.0, 15.0), seed=seed)
        dicom_of(thin, tmp_path / "studies" / str(seed))
    plain = {"page": False, "pictures": False, "segmentation": False, "measurements": False}
    vertical = CtAnalysis(CtSettings(network={"model": model}, **plain))
    with Engine(threads=1, backend="eager") as engine:
        for one in vertical.models():
            engine.add(one, batch_range=vertical.batch_range)
        model.unlink()
        model.with_suffix(".json").unlink()
        batch = Batch(vertical, engine, tmp_path / "studies", tmp_path / "out")
        assert list(batch.run().states.values()) == ["done", "done"]
    assert len(list((tmp_path / "out").glob("*/segmentation.nii.gz"))) == 2


# -- real studies ------------------------------------------------------------------------------
@pytest.mark.soak
def test_a_real_head_ct_gets_an_honest_report(real: Callable[[str], Path], tmp_path: Path) -> None:
    vertical = CtAnalysis(CtSettings(nodules=True))
    items = list(vertical.discover(real("ge-head-ct-28")))
    results = []
    for item in items:
        answer = run_with_models(vertical, [vertical.load(item)])[0]
        if isinstance(answer, WithArtefacts):
            results.append(answer)
        else:
            assert answer.reason in ("too_thin", "not_hu", "no_body"), answer
    assert results, "at least the largest stack is a head that can be measured"
    for report in (result.response for result in results):
        assert report.finding("lungs_volume").value is None
        assert report.nodules is None
        assert any("no lungs" in warning for warning in report.warnings)
        bone, body = report.finding("bone_volume").value, report.finding("body_volume").value
        assert bone is not None
        assert body is not None
        assert 100 < bone < body / 2
        assert 500 < body < 8000
    vertical.write(results[0], tmp_path)
    assert (tmp_path / "report.html").exists()


Studied = Callable[[str], Told]


@pytest.fixture(scope="module")
def studied(real: Callable[[str], Path]) -> Studied:
    """What the product says of a real series, analysed once: ``studied("chest-ct-64")``."""
    return cache(lambda name: told_of(real(name)))


TWICE = ("philips-ct-tilt-s2010",)
"""A tilted stack is told by the head too."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.soak) if one in TWICE else one for one in SERIES],
)
def test_the_page_says_of_each_real_series_what_the_product_says(
    studied: Studied, name: str
) -> None:
    """What benchmarks/dicom_series.py prints."""
    page = Path(__file__).resolve().parents[3] / "docs" / "medical.md"
    assert studied(name).row(name) in page.read_text().splitlines()


def test_a_real_abdomen_has_no_lungs(studied: Studied) -> None:
    """With bowel gas, and with UIDs that an anonymiser emptied."""
    report = studied("ct-abdomen-20").report
    assert report is not None
    assert report.finding("lungs_volume").value is None
    assert any("UID are empty" in warning for warning in report.warnings)


def test_a_real_chest_is_measured_as_far_as_its_kernel_bears(studied: Studied) -> None:
    """A lung kernel, and a mass of 5 to 6 cm in the left upper lobe."""
    report = studied("chest-ct-64").report
    assert report is not None
    assert report.finding("lungs_volume").value == pytest.approx(5720, rel=0.02)
    assert report.finding("airway_volume").value == pytest.approx(22.5, rel=0.1)
    assert report.finding("lungs_laa950").value is None
    assert "kernel L is sharp" in report.finding("lungs_perc15").method
    assert any("between the left lung and its ribs" in warning for warning in report.warnings)
    assert not any("the right lung and its ribs" in warning for warning in report.warnings)
    assert not any("field of view" in warning for warning in report.warnings)


def test_a_real_mr_is_refused(studied: Studied) -> None:
    assert studied("t1-mr-384").limits[0].startswith("refused (`no_ct`)")


def test_a_real_quality_phantom_is_no_chest(studied: Studied) -> None:
    report = studied("philips-ct-s2010-28x5mm").report
    assert report is not None
    assert report.finding("lungs_volume").value is None
    assert any("no lungs" in warning for warning in report.warnings)


# -- memory ------------------------------------------------------------------------------------
MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.vertical import *
from plinth.verticals.testing.flows import run_with_models

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

vertical = CtAnalysis(CtSettings(nodules=True, working_spacing_mm=3))
run_with_models(vertical, [vertical.example()])
slices = int(sys.argv[1])
volume = phantom_volume(Phantom(shape=(300, 240, slices), spacing=(1.2, 1.2, 216 / slices)))
before = peak()
run_with_models(vertical, [StudyRequest(volume)])
print(volume.voxels.nbytes, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.soak
def test_peak_memory_grows_by_little_more_than_two_masks_with_the_slices() -> None:
    """What is held besides the volume: its labels and regions, one byte a voxel each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(slices)], stdout=subprocess.PIPE, text=True
        )
        for slices in (100, 300)
    ]
    measured = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    (small, peak_small), (large, peak_large) = ((int(a), int(b)) for a, b in measured)
    grown = (peak_large - peak_small) / ((large - small) / 2)  # bytes per further voxel
    assert grown < 4.0
