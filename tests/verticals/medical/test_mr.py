"""MR brain tissue: which series it is for, what it refuses, and what it says of a real head."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from medical.own_networks import write_script
from torch import nn
from torch.nn import functional as F

from plinth.engine import Engine, InputError, ModelError
from plinth.verticals.medical import CtAnalysis, CtSettings
from plinth.verticals.medical.mr.brain import (
    GREY,
    WHITE,
    Weighting,
    check_head,
    check_labels,
    check_tissue,
)
from plinth.verticals.medical.networks.analysis import segment
from plinth.verticals.medical.networks.load import load_network
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

MODELS = Path(__file__).resolve().parents[4] / "shared" / "models" / "meshnet"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Weighting(2.98, 2300.0, 900.0), None),  # MPRAGE
        (Weighting(3.0, 7.2), None),  # spoiled gradient echo
        (Weighting(10.0, 500.0, place="BRAIN"), None),  # spin echo
        (Weighting(), None),  # nothing is known: the images decide
        (Weighting(96.0, 4500.0), "Echo Time is 96 ms"),  # T2
        (Weighting(12.0, 3000.0), "Repetition Time is 3000 ms without an inversion"),  # PD
        (Weighting(9.0, 9000.0, 2500.0), "Inversion Time is 2500 ms"),  # fluid attenuated
        (Weighting(3.0, 7.2, place="KNEE"), "of the knee"),
        (Weighting(3.0, 7.2, place="ZANZIBAR"), "of another part"),  # a name is not repeated
        (Weighting(3.5, 22.0, angiography=True), "an angiography"),
    ],
)
def test_only_t1_weighted_heads_are_taken_and_others_are_told_why(made, said):
    why = made.why_not_t1()
    assert (why is None) if said is None else (why is not None and said in why)


@pytest.mark.parametrize("kind", ["P", "PHASE MAP", "R", "T1 MAP"])
def test_phases_parts_and_maps_are_no_weighted_images(kind):
    """They lie beside the magnitudes, with the same times in their headers."""
    volume, _ = brain(600, 800)
    check_head(volume)
    series = replace(volume.series, image_type=("ORIGINAL", "PRIMARY", kind, "ND"))
    with pytest.raises(InputError, match="not magnitudes") as refused:
        check_head(replace(volume, series=series))
    assert refused.value.reason == "not_t1_head"


def brain(
    grey: float, white: float, *, spacing: float = 2.5, side: int = 64
) -> tuple[Volume, np.ndarray]:
    """A ball of white matter in a shell of grey, as MR, and its labels (1 white, 2 grey)."""
    z, y, x = np.meshgrid(*[np.arange(side) - side / 2] * 3, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2) * spacing
    labels = np.where(radius < 50, 1, np.where(radius < 66, 2, 0)).astype(np.uint8)
    voxels = np.choose(labels, [10, white, grey]).astype(np.int16)
    facts = SeriesFacts("ball", "MR", "", side, side, (spacing,) * 3, side)
    return Volume(voxels, np.diag([spacing] * 3 + [1.0]), Verdict(), facts), labels


NAMES = {1: WHITE, 2: GREY}


def test_a_result_that_cannot_be_a_brain_in_t1_is_refused():
    volume, labels = brain(600, 800)
    check_tissue(volume, labels, NAMES)
    for case, said in (
        (brain(800, 600), "not brighter than grey"),  # as in T2
        (brain(600, 800, spacing=0.9, side=160), None),
    ):
        if said is None:
            check_tissue(*case, NAMES)
            continue
        with pytest.raises(InputError, match=said) as refused:
            check_tissue(*case, NAMES)
        assert refused.value.reason == "not_t1_head"
    little = labels.copy()
    little[:32][little[:32] == 1] = 2  # as where bright fat presses the values of tissue together
    with pytest.raises(InputError, match=r"white matter would be 2\d% of grey and white"):
        check_tissue(volume, little, NAMES)
    with pytest.raises(InputError, match="a brain has 500 to 2000"):
        check_tissue(volume, np.where(labels == 1, labels, 0).astype(np.uint8), NAMES)


@given(st.sampled_from(["thin", "thick", "small"]))
def test_a_field_of_view_without_a_whole_head_is_refused(kind):
    volume, _ = brain(600, 800)
    if kind == "thin":
        assert "Echo Time" in check_head(volume)[0], "nothing is known of its weighting"
        return
    factor = 2.0 if kind == "thick" else 0.5
    other = replace(volume, affine=volume.affine @ np.diag([factor, factor, factor, 1.0]))
    with pytest.raises(InputError, match="wide" if kind == "thick" else "no whole head"):
        check_head(other)


def test_a_network_that_labels_something_else_is_refused():
    with pytest.raises(ModelError, match="Grey Matter and White Matter"):
        check_labels({1: "spleen"})


def test_series_of_another_kind_are_refused_before_the_network_runs(real, tmp_path):
    """A real head whose headers say that it is T2-weighted."""
    if not MODELS.is_dir():
        pytest.skip("no real networks beside the checkout")
    for path in sorted(real("t1-mr-384").rglob("*"))[:200:8]:
        if path.is_file():
            header = pydicom.dcmread(path)
            header.EchoTime, header.RepetitionTime = 96.0, 4500.0
            header.save_as(tmp_path / path.name)
    vertical = CtAnalysis(CtSettings(brain={"model": MODELS / "model5_gw_ae"}))
    (item,) = vertical.discover(tmp_path)
    flow = vertical.infer([vertical.load(item)])
    with Engine(threads=1, backend="eager") as engine:
        (refused,) = engine.run(flow).value
    assert isinstance(refused, InputError)
    assert refused.reason == "not_t1_head"
    assert "Echo Time is 96 ms" in refused.message


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_real_head_gets_the_volumes_of_a_brain(real, tmp_path):
    """Bright fat and vessels take up to 278, tissue up to 100: the robust maximum cuts them off."""
    if not MODELS.is_dir():
        pytest.skip("no real networks beside the checkout")
    vertical = CtAnalysis(CtSettings(brain={"model": MODELS / "model5_gw_ae"}))
    (item,) = vertical.discover(real("t1-mr-384"))
    with Engine(threads=1, backend="auto") as engine:
        for model in vertical.models():
            engine.add(model, batch_range=(1, 1))
        (result,) = engine.run(vertical.infer([vertical.load(item)])).value
    if isinstance(result, InputError):
        raise result
    told = {one.title.partition(",")[0]: one.value for one in result.response.findings}
    assert 350 <= told[WHITE] <= 900
    assert 450 <= told[GREY] <= 1100
    written = {path.name for path in vertical.write(result, tmp_path)}
    assert {"segmentation.dcm", "measurements.dcm", "report.json"} <= written


class Bright(nn.Module):
    """A network of two classes: brighter than a value, or not."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.head = nn.Conv3d(1, 2, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([0.0, 40.0]).view(2, 1, 1, 1, 1))
            self.head.bias.copy_(torch.tensor([0.0, -40.0 * above]))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, x, y, z) to (n, 2, x, y, z)."""
        return self.head(volume).softmax(1)


def by_hand(volume: Volume, box: nn.Module, main: nn.Module) -> np.ndarray:
    """What deepbet does with its two networks, step by step, in torch: (z, y, x) bool.

    Fisch et al., Computers in Biology and Medicine 2024; the code of the package's 1.0.2.
    """

    def normalised(values: torch.Tensor) -> torch.Tensor:
        values = ((values - low) / (high - low)).clamp(0, 1)
        return 0.226 * (values - values.mean()) / values.std() + 0.449

    whole = torch.from_numpy(volume.voxels.astype(np.float32).transpose(2, 1, 0)).flip(0, 1)
    small = F.interpolate(whole[None, None], (128,) * 3, mode="nearest-exact")[0, 0]
    low, high = (torch.tensor(np.quantile(small.numpy(), q)) for q in (0.005, 0.995))
    with torch.inference_mode():
        found = box(normalised(small)[None, None])[0, 1] > 0.5
        spans = []
        for axis, size in enumerate(whole.shape):
            others = [n for n in range(3) if n != axis]
            planes = torch.where(found.float().mean(others) > 0.02)[0]
            middle = ((planes.max() + 1 + planes.min()) / 2 * size / 128).round()
            extent = ((planes.max() + 1 - planes.min()) * size / 128 * 1.2).round()
            start, stop = int(middle - extent / 2), int(middle + extent / 2)
            spans.append(slice(max(0, start), min(size, stop)))
        cut = whole[tuple(spans)]
        seen = F.interpolate(cut[None, None], (256,) * 3, mode="nearest-exact")[0, 0]
        answer = main(normalised(seen)[None, None])[:, 1:]
    mask = torch.zeros(whole.shape)
    mask[tuple(spans)] = F.interpolate(answer, cut.shape, mode="nearest-exact")[0, 0]
    return (mask.flip(0, 1).numpy().transpose(2, 1, 0)) > 0.5


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_deepbets_two_networks_give_what_its_own_steps_give(tmp_path):
    volume, labels = brain(600, 800, side=48, spacing=3.5)
    volume.voxels[labels == 2] += np.arange(-20, 20, dtype=np.int16).repeat(200_000)[
        : int((labels == 2).sum())
    ]
    networks = Bright(0.5).eval(), Bright(0.75).eval()
    for name, network in zip(("bbox_model.pt", "model.pt"), networks, strict=True):
        write_script(network, tmp_path / name)
    network = load_network(tmp_path)
    assert network.original is not None, "it runs as a graph, held against the original"
    with Engine(threads=1, backend="eager") as engine:
        for model in (network.model, network.reference, network.finds.reference):
            engine.add(model, batch_range=(1, 1))
        found = engine.run(segment(volume, network)).value
    theirs = by_hand(volume, *networks)
    assert 1000 < theirs.sum() < theirs.size / 2
    ours = found.labels == 1
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) >= 0.999
    assert found.agreement.passed
    assert found.agreement.dice == {"Brain": 1.0}
