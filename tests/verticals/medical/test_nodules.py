"""Nodules: the network that looks, and what is measured where it answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medical.chests import chest
from torch import Tensor

from plinth.engine import Call, Engine, ModelStore
from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.nodules.candidates import (
    MAX_CANDIDATES,
    Candidates,
    Nodule,
    confidences,
    find_candidates,
    recheck,
)
from plinth.verticals.medical.nodules.candidates import NetworkInput as Seen
from plinth.verticals.medical.nodules.network import NoduleUNet, windowed
from plinth.verticals.medical.output.report import CtReport, CtResult
from plinth.verticals.medical.phantom import chest as phantom
from plinth.verticals.medical.phantom.chest import NODULES, Phantom
from plinth.verticals.medical.training.quality import Tally, held_out, on_patches
from plinth.verticals.medical.training.train import train, weight
from plinth.verticals.medical.vertical import MODEL, STORE, CtAnalysis, CtSettings, StudyRequest
from plinth.verticals.medical.volumes.resample import Grid
from plinth.verticals.medical.volumes.volume import Volume
from plinth.verticals.testing import feed

pytestmark = pytest.mark.slow
COARSE = {"shape": (120, 90, 72), "spacing": (2.9, 2.9, 3.0)}
FINE = {"shape": (220, 160, 130), "spacing": (1.6, 1.7, 1.6)}
WINDOW = (32, 48, 48)


def analysed(volume: Volume, **options: Any) -> CtReport:
    """The vertical on the engine, with the packaged weights."""
    vertical = CtAnalysis(CtSettings(nodules=True, **options))
    with Engine() as engine:
        for model in vertical.models():
            engine.add(model, batch_range=(1, 4))
        result = engine.run(vertical.infer([StudyRequest(volume)])).value[0]
    assert isinstance(result, WithArtefacts), result
    return result.response


def told(volume: Volume, answer: Tensor | None, share: float = 0.9, **options: Any) -> CtReport:
    """The report of :func:`result_of`."""
    return result_of(volume, answer, share, **options).response


def result_of(
    volume: Volume, answer: Tensor | None, share: float = 0.9, **options: Any
) -> CtResult:
    """The vertical with an answer in the network's place.

    Args:
        volume: the scan.
        answer: (Z, Y, X) on the working grid; None marks what is denser than -700 HU.
        share: nodule probability of the second look, everywhere.
    """

    def first(call: Call) -> Tensor:
        assert call.tiling is not None
        dense = (call.rows[0] > (-700 + 1000) / 1400).to(torch.uint8)  # type: ignore[index]
        return dense if answer is None else answer

    def second(call: Call) -> Tensor:
        assert isinstance(call.rows, Tensor)
        shape = call.rows.shape
        logit = float(np.log(share / (1 - share)))
        logits = torch.zeros(shape[0], 2, *shape[2:])
        logits[:, 1] = logit
        return logits

    flow = CtAnalysis(CtSettings(nodules=True, **options)).infer([StudyRequest(volume)])
    found = feed(flow, first, second)[0]
    assert isinstance(found, WithArtefacts), found
    return found


def alone(*nodules: phantom.Nodule, **changes: Any) -> Volume:
    """A chest with these nodules and no noise."""
    return chest(**{**COARSE, "noise_hu": 0.0, "nodules": nodules, **changes})


# -- what is measured, whatever the network ----------------------------------------------------
SPHERES = (
    phantom.Nodule((-80.0, -40.0, -30.0), 6.0, 40.0),
    phantom.Nodule((-80.0, 10.0, 45.0), 10.0, 40.0),
    phantom.Nodule((80.0, -30.0, 20.0), 20.0, 40.0),
    phantom.Nodule((80.0, 20.0, -45.0), 14.0, -550.0),
)


@pytest.fixture(scope="module")
def spheres() -> list[Nodule]:
    """What is told of a chest with these four, at less than 2 mm a voxel."""
    return told(alone(*SPHERES, **FINE), None).nodules or []


@pytest.mark.parametrize("nodule", SPHERES, ids=lambda one: f"{one.diameter:g} mm, {one.hu:g} HU")
def test_a_sphere_is_measured_where_and_as_large_as_it_is(
    spheres: list[Nodule], nodule: phantom.Nodule
) -> None:
    nearest = min(spheres, key=lambda one: np.linalg.norm(place(one) - expected(nodule)))
    assert np.linalg.norm(place(nearest) - expected(nodule)) < 0.5
    assert nearest.diameter_mm == pytest.approx(nodule.diameter, abs=0.8)  # half a voxel
    # its edge counts in
    assert nearest.mean_hu == pytest.approx(nodule.hu, abs=0.4 * abs(nodule.hu + 850))
    assert nearest.side == ("left" if nodule.centre[0] > 0 else "right")


def test_nothing_outside_the_lungs_is_told(spheres: list[Nodule]) -> None:
    """Ribs and spine are dense and not told; besides the four, only vessels lie in these lungs."""
    known = [expected(one) for one in SPHERES]
    others = [one for one in spheres if min(np.linalg.norm(place(one) - k) for k in known) > 2]
    assert all(one.diameter_mm < 12 for one in others)


def place(nodule: Nodule) -> np.ndarray:
    return np.asarray(nodule.centre_lps_mm)


def expected(nodule: phantom.Nodule) -> np.ndarray:
    return np.asarray(nodule.centre) + Phantom().centre


def test_labels_number_the_nodules_largest_first() -> None:
    volume = alone(*NODULES)
    result = result_of(volume, None)
    report, artefacts = result.response, result.artefacts
    sizes = [one.volume_mm3 for one in report.nodules or []]
    assert sizes == sorted(sizes, reverse=True)
    for one in report.nodules or []:
        voxels = np.argwhere(artefacts.analysis.labels == 3 + one.number)
        assert len(voxels) * volume.voxel_volume_mm3 == pytest.approx(one.volume_mm3, rel=0.01)
        centre = volume.index_to_lps(voxels.mean(axis=0)[::-1])
        assert np.linalg.norm(centre - one.centre_lps_mm) < 0.02
        assert abs(voxels[:, 0].mean() + 1 - one.slice) <= 0.5


@pytest.mark.soak
def test_small_and_doubtful_candidates_are_dropped() -> None:
    volume = alone(*NODULES)
    whole = told(volume, None).nodules or []
    assert min(one.diameter_mm for one in whole) < 8
    assert {one.confidence for one in whole} == {0.9}
    large = told(volume, None, min_nodule_mm=8.0).nodules or []
    assert large
    assert min(one.diameter_mm for one in large) >= 8
    assert told(volume, None, share=0.4).nodules == []


def test_an_answer_in_a_thousand_pieces_is_cut_short() -> None:
    volume = alone()

    def speckled(call: Call) -> Tensor:
        assert isinstance(call.rows, Tensor)
        answer = torch.zeros(call.rows.shape[1:], dtype=torch.uint8)
        answer[20:-20:6, 20:-20:6, 20:-20:6] = 1
        answer[21:-20:6, 20:-20:6, 20:-20:6] = 1
        answer[22:-20:6, 20:-20:6, 20:-20:6] = 1
        return answer

    flow = CtAnalysis(CtSettings(nodules=True)).infer([StudyRequest(volume)])
    result = feed(
        flow,
        speckled,
        lambda call: torch.ones(len(call.rows), 2, *WINDOW),  # type: ignore[arg-type]
    )[0]
    assert isinstance(result, WithArtefacts)
    assert any("left out" in warning for warning in result.response.warnings)


def test_no_lungs_means_not_looked_for() -> None:
    volume = alone()
    body = replace(
        volume, voxels=np.where(volume.voxels > -900, np.maximum(volume.voxels, 0), -1000)
    )
    result = feed(CtAnalysis(CtSettings(nodules=True)).infer([StudyRequest(body)]))[0]
    assert isinstance(result, WithArtefacts)
    assert result.response.nodules is None
    assert any("not looked for" in warning for warning in result.response.warnings)


# -- pieces and the second look ------------------------------------------------------------------
@given(
    shape=st.tuples(*[st.integers(4, 70)] * 3),
    corner=st.tuples(*[st.floats(0, 1)] * 3),
    size=st.integers(2, 12),
)
def test_the_second_look_sees_the_whole_piece(
    shape: tuple[int, int, int], corner: tuple[float, float, float], size: int
) -> None:
    start = [int(share * (n - 1)) for share, n in zip(corner, shape, strict=True)]
    answer = torch.zeros(shape, dtype=torch.uint8)
    answer[tuple(slice(s, s + size) for s in start)] = 1
    found = find_candidates(answer)
    if not found.boxes:  # fewer than three voxels
        assert int(answer.sum()) < 3
        return
    rows = recheck(seen(answer), found, WINDOW)
    assert rows.shape == (1, 1, *WINDOW)
    assert int(rows.sum()) == int(answer.sum())
    logits = torch.cat([torch.zeros_like(rows), 20 * rows - 10], dim=1)
    assert confidences(logits, found) == pytest.approx([1.0], abs=1e-3)


def seen(answer: Tensor) -> Seen:
    z, y, x = answer.shape
    grid = Grid((z, y, x), (z, y, x), (1.0, 1.0, 1.0))
    return Seen((slice(0, z), slice(0, y), slice(0, x)), grid, answer[None].float())


def test_pieces_are_numbered_by_size_and_bounded() -> None:
    answer = torch.zeros(40, 120, 120, dtype=torch.uint8)
    answer[::4, ::4, ::4] = answer[1::4, ::4, ::4] = answer[2::4, ::4, ::4] = 1
    answer[10:20, 10:20, 10:20] = 1
    found = find_candidates(answer)
    assert isinstance(found, Candidates)
    assert len(found.boxes) == MAX_CANDIDATES
    assert found.dropped > 0
    assert found.labels[15, 15, 15] == 1
    assert found.labels.max() == MAX_CANDIDATES


# -- the network -----------------------------------------------------------------------------------
def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(3)
    net = NoduleUNet(norm=True).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(2, 1, 16, 16, 16))
    rows = torch.rand(3, 1, 16, 24, 20)
    with torch.inference_mode():
        assert torch.allclose(net.eval()(rows), net.folded()(rows), atol=1e-5)


def test_a_lone_window_is_answered_as_among_others() -> None:
    net = ModelStore(STORE).load(MODEL).module
    rows = torch.rand(3, 1, *WINDOW, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = net(rows)
        for row, answer in zip(rows, together, strict=True):
            assert torch.allclose(net(row[None])[0], answer, atol=1e-5)


@given(hu=st.floats(-3000, 3000))
def test_the_window_keeps_order_and_bounds(hu: float) -> None:
    low, here, high = windowed(torch.tensor([hu - 1, hu, hu + 1])).tolist()
    assert 0 <= low <= here <= high <= 1


def test_the_packaged_weights_are_small_whole_and_measured() -> None:
    store = ModelStore(STORE)
    spec = store.verify(MODEL)
    files = list((STORE / MODEL / spec.version).iterdir())
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    assert "Research use only" in spec.description
    assert spec.source.startswith("python -m ")
    assert spec.metrics["scans"] >= 20
    assert spec.metrics["sensitivity_from_6_mm"] >= 0.9
    assert spec.metrics["false_per_scan"] <= 1


def test_the_stated_agreement_on_patches_is_reproducible() -> None:
    model = ModelStore(STORE).load(MODEL)
    measured = on_patches(model.module)  # type: ignore[arg-type]
    for name, value in measured.items():
        assert value == pytest.approx(model.spec.metrics[name], rel=0.02, abs=0.01), name


def test_nodules_of_a_chest_are_found_within_two_millimetres() -> None:
    report = analysed(chest(**FINE))
    found = [place(one) for one in report.nodules or []]
    assert len(found) <= len(NODULES) + 1
    for nodule in NODULES:
        off = min(float(np.linalg.norm(expected(nodule) - centre)) for centre in found)
        assert off < 2, nodule
    largest = (report.nodules or [])[0]
    assert largest.diameter_mm == pytest.approx(20, rel=0.05)
    assert all(one.confidence >= 0.5 for one in report.nodules or [])


@pytest.mark.soak
def test_a_chest_without_nodules_has_at_most_one_candidate() -> None:
    report = analysed(chest(**{**FINE, "nodules": (), "seed": 91}))
    assert report.nodules is not None
    assert len(report.nodules) <= 1


# -- training and measuring ----------------------------------------------------------------------
def test_training_is_reproducible_and_learns() -> None:
    one, two = (train(seed=5, steps=3, rows=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train(seed=6, steps=3, rows=1).state_dict()
    assert not all(torch.equal(one[name], other[name]) for name in one)


@given(size=st.integers(1, 14))
@settings(max_examples=10)
def test_small_nodules_weigh_more_than_large_ones(size: int) -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[:size, :size, :size] = True
    weights = weight(mask)
    assert (weights[~mask] == 1).all()
    assert 1 <= weights[0, 0, 0] <= 12
    mask[size, :size, :size] = True
    assert weight(mask)[0, 0, 0] <= weights[0, 0, 0]


def test_the_tally_counts_hits_misses_and_false_ones() -> None:
    def candidate(x: float, diameter: float) -> Nodule:
        return Nodule(
            number=1,
            side="left",
            volume_mm3=1,
            diameter_mm=diameter,
            mean_hu=0,
            centre_lps_mm=(x, 0, 0),
            confidence=0.9,
            slice=1,
        )

    def truth(x: float, diameter: float, hu: float = 40) -> dict[str, Any]:
        return {"centre_lps_mm": [x, 0, 0], "diameter_mm": diameter, "hu": hu}

    tally = Tally()
    tally.add([truth(0, 10), truth(50, 5), truth(90, 8, -550)], [candidate(1, 11), candidate(4, 6)])
    tally.add([], [candidate(0, 5)])
    metrics = tally.metrics()
    assert (metrics["scans"], metrics["nodules"]) == (2, 3)
    assert metrics["sensitivity"] == pytest.approx(1 / 3, abs=1e-3)
    assert metrics["sensitivity_4_to_6_mm"] == metrics["sensitivity_ground_glass"] == 0
    assert metrics["sensitivity_from_6_mm"] == 0.5
    assert metrics["false_per_scan"] == 1  # the second near the first truth, and the lone one
    assert (metrics["centre_error_mm_median"], metrics["diameter_error_mm_median"]) == (1, 1)


def test_held_out_nodules_lie_inside_the_lungs_and_apart() -> None:
    scans = list(held_out(12))
    assert len({scan.seed for scan in scans}) == 12
    for scan in scans:
        for nodule in scan.nodules:
            side = np.asarray([-82.0 if nodule.centre[0] < 0 else 82.0, 0, 0])
            inside = (np.asarray(nodule.centre) - side) / phantom.LUNG_RADII
            assert np.linalg.norm(inside) < 1
            assert 4 <= nodule.diameter <= 25
        for one in scan.nodules:
            for other in scan.nodules:
                gap = np.linalg.norm(np.subtract(one.centre, other.centre))
                assert one is other or gap > (one.diameter + other.diameter) / 2
