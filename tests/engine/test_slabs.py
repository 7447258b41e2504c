"""Graphs of large volumes in slabs: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plinth.engine import Call, Engine, Model, ModelSpec, TensorSpec
from plinth.engine.backends.export import Traced
from plinth.engine.models.families import slabs

pytestmark = pytest.mark.cpu
ATEN = torch.ops.aten
threes = st.tuples(*(st.integers(1, 3),) * 3)


shapes = st.tuples(
    threes, threes, *(st.tuples(*(st.integers(*ends),) * 3) for ends in ((1, 2), (0, 2)))
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    beyond=st.none() | st.integers(0, 2),
    groups=st.integers(1, 2),
    biased=st.booleans(),
    slab=st.sampled_from([1, 20_000]),
)
def test_convolutions_in_slabs_are_those_of_the_whole(shape, beyond, groups, biased, slab) -> None:
    """Kernels that leave planes out, paddings wider than kernels, planes that no input reaches."""
    kernel, stride, dilation, padding = shape
    transposed, beyond = beyond is not None, beyond or 0
    assume(all(beyond < max(each) for each in zip(stride, dilation, strict=True)))
    torch.manual_seed(0)
    x = torch.randn(2, 2 * groups, 7, 6, 5)
    sizes = (2 * groups, 3) if transposed else (3 * groups, 2)
    weight, bias = torch.randn(*sizes, *kernel), torch.randn(3 * groups) if biased else None
    how = (*map(list, (stride, padding, dilation)), transposed, [beyond] * 3, groups)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        try:
            want = ATEN.convolution.default(x, weight, bias, *how)
        except RuntimeError:
            assume(False)
        assume(want.numel())
        patch.setattr(slabs, "LARGE", 0)
        patch.setattr(slabs, "SLAB", slab)
        got = slabs.convolution(x, weight, bias, *how)
    assert torch.allclose(got, want, atol=1e-4)


class Net(nn.Module):
    """Convolutions down and up, each normalised; features that are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 6, 3, stride=2, padding=1)
        self.one, self.two = (nn.Conv3d(6, 6, 3, padding=1) for _ in range(2))
        self.up = nn.ConvTranspose3d(6, 3, 2, stride=2)
        self.norms = nn.ModuleList(nn.InstanceNorm3d(6, affine=n == 1) for n in range(3))

    def forward(self, volume: Tensor) -> Tensor:
        """(n, 1, z, y, x) to shares (n, 3, z, y, x)."""
        first = self.norms[0](self.down(volume)).relu()
        kept = self.one(first)
        second = nn.functional.leaky_relu(self.norms[1](kept))
        third = nn.functional.elu(self.norms[2](self.two(second + first))) + kept
        return self.up(third).softmax(1)


def program_of(net: nn.Module, size: tuple[int, int, int]) -> Model:
    inputs = (TensorSpec(name="volume", shape=(1, *size)),)
    outputs = (TensorSpec(name="shares", shape=(3, *size)),)
    spec = ModelSpec(name="net", inputs=inputs, outputs=outputs)
    program = Traced(Model(spec, net)).program
    module = program.module(check_guards=False)
    for part in module.modules():
        part.training = False
    return Model(spec, module, made_from="net")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "LARGE", 0)
    monkeypatch.setattr(slabs, "SLAB", 1 << 15)


def test_a_graph_in_slabs_gives_what_it_gave(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another node reads too is not written over, and the model's own graph stays as it is."""
    torch.manual_seed(0)
    net, volume = Net().eval(), torch.randn(2, 1, 12, 10, 14)
    model = program_of(net, (12, 10, 14))
    assert slabs.may_spare(model.module)
    before = str(model.module.graph)
    calls = list[int]()
    made = slabs._sizes
    monkeypatch.setattr(slabs, "_sizes", lambda *a: calls.append(1) or made(*a))
    with Engine(threads=1, backend="eager") as engine:
        engine.add(model, batch_range=(1, 2))
        calls.clear()
        got = engine.submit(Call("net", {"volume": volume})).result().value
    assert len(calls) == 4  # each convolution
    with torch.inference_mode():
        assert torch.allclose(got, net(volume), atol=1e-5)
    assert str(model.module.graph) == before


def test_what_nobody_else_reads_is_written_over(small) -> None:
    net = program_of(Net().eval(), (12, 10, 14)).module
    slabs.sparing(net)
    targets = [node.target for node in net.graph.nodes]
    assert (targets.count(slabs.conv3d), targets.count(slabs.conv_transpose3d)) == (3, 1)
    assert targets.count(slabs.softmax) == 1
    assert targets.count(slabs.instance_norm) == 2  # not of what is added to the features again
    assert ATEN.relu_.default in targets
    assert ATEN.leaky_relu_.default in targets


def test_graphs_without_volumes_stay_as_they_are() -> None:
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), (torch.rand(1, 1, 8, 8),)
    )
    assert not slabs.may_spare(program.module())


def test_a_volume_by_itself_is_taken_as_torch_takes_it() -> None:
    volume, weight, wider = (
        torch.rand(2, 7, 6, 5),
        torch.rand(3, 2, 3, 3, 3),
        torch.rand(2, 3, 3, 3, 3),
    )
    with torch.inference_mode():
        want = ATEN.conv3d.default(volume, weight, None, [1, 1, 1], [1, 1, 1])
        assert torch.allclose(slabs.conv3d(volume, weight, None, 1, [1]), want)
        want = ATEN.conv_transpose3d.input(volume, wider, None, [2] * 3, [1] * 3, [1] * 3)
        assert torch.allclose(slabs.conv_transpose3d(volume, wider, None, 2, [1], 1), want)
