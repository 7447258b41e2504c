"""Packed weights: every tensor comes back bit by bit, and what is no packed file is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plinth.engine import ModelError
from plinth.engine.compression import coding, packing
from plinth.engine.compression.coding import CodingError
from plinth.engine.compression.packing import Coded, PackedFile
from plinth.engine.mapped import is_mapped

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import packed_mutations

pytestmark = pytest.mark.cpu


def laplace(shape: tuple[int, int], high: int, keep: float, seed: int) -> np.ndarray:
    """Codes as a pruned layer has them; some rows keep more than others."""
    random = np.random.default_rng(seed)
    values = random.laplace(size=shape) * random.gamma(2, size=(shape[0], 1))
    cut = np.quantile(abs(values), 1 - keep)
    codes = np.clip(np.round(values / abs(values).max() * high * 3), -high, high)
    codes = np.where(codes == 0, np.sign(values) * min(high, 1), codes)
    return np.where(abs(values) >= cut, codes, 0).astype(np.int8)


@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 300),
    high=st.sampled_from([0, 1, 2, 7, 8, 100, 127]),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
    fast=st.booleans(),
)
def test_codes_come_back_as_they_were(rows, length, high, keep, seed, fast):
    codes = laplace((rows, length), high, keep, seed)
    layout, data = coding.encode(codes, fast=fast)
    assert layout in coding.LAYOUTS
    assert np.array_equal(coding.decode(layout, memoryview(data), rows, length), codes)


def test_every_code_of_int8_has_a_place_in_rans():
    codes = np.repeat(np.arange(-128, 128), np.arange(256) // 8 + 1).astype(np.int8).reshape(1, -1)
    data = coding._rans(codes, 1)
    assert np.array_equal(coding.decode("rans", memoryview(data), *codes.shape), codes)


def test_rows_of_their_own_statistics_take_fewer_bytes_than_zstd_takes():
    codes = laplace((128, 1152), 1, 0.1, 0)
    layout, data = coding.encode(codes)
    assert layout == "rans"
    assert len(data) < 0.95 * len(coding.encode(codes, fast=True)[1])


@pytest.mark.parametrize("layout", coding.LAYOUTS)
def test_bytes_of_another_length_are_refused(layout):
    for data in (b"", b"\0", b"\xff" * 7, coding.squeeze(b"\0" * 99)):
        with pytest.raises(CodingError):
            coding.decode(layout, memoryview(data), 10, 10)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor | Coded]:
    noise = torch.Generator().manual_seed(0)
    codes = torch.from_numpy(laplace((64, 576), 1, 0.1, 0)).reshape(64, 64, 3, 3)
    return {
        "conv.weight": Coded(codes, torch.rand(64, generator=noise).half() - 0.5),
        "up.weight": Coded(codes[:2] * 3, torch.rand(64, generator=noise).half(), axis=1),
        "dense.weight": torch.randn(300, 70, generator=noise),
        "bias": torch.randn(64, generator=noise),
        "half": torch.randn(9000, generator=noise).half().float(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]),
        "low": torch.randn(33, generator=noise).bfloat16(),
        "count": torch.tensor(12),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(4, generator=noise, dtype=torch.float64),
    }


def test_tensors_come_back_bit_by_bit(tmp_path, tensors):
    path = tmp_path / "weights.packed"
    packing.write(path, tensors, {"tied.weight": "conv.weight"})
    with PackedFile(path) as file:
        assert list(file.entries) == [*tensors, "tied.weight"]
        for name, value in tensors.items():
            want = value.dense() if isinstance(value, Coded) else value
            got = file.dense(name)
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert packing._bits(got) == packing._bits(want), name
        assert torch.equal(file.dense("tied.weight"), file.dense("conv.weight"))


def test_a_pruned_ternary_layer_takes_less_than_a_bit_a_weight(tmp_path, tensors):
    path = tmp_path / "weights.packed"
    packing.write(path, {"conv.weight": tensors["conv.weight"]})
    assert 8 * path.stat().st_size / tensors["conv.weight"].codes.numel() < 0.65


def test_large_tensors_lie_in_the_file_and_outlive_the_reader(tmp_path):
    path = tmp_path / "weights.packed"
    random = torch.randint(-128, 128, (64, 512), generator=torch.Generator().manual_seed(0))
    packing.write(path, {"weight": Coded(random.to(torch.int8), torch.ones(64).half())})
    with PackedFile(path) as file:
        entry = file.entries["weight"]
        found = file.read("weight")
        start = np.frombuffer(file._bytes, np.uint8).ctypes.data
    assert entry.layout == "i8", "noise cannot be made smaller"
    assert entry.offset % 64 == 0
    assert found.codes.data_ptr() == start + entry.offset
    found.codes[0, 0] = 5  # the file stays as it is
    with PackedFile(path) as file:
        assert torch.equal(file.read("weight").codes, random.to(torch.int8))


@pytest.mark.parametrize(
    ("at", "change", "reason"),
    [
        (0, b"NOTAPACK", "begins with"),
        (8, b"\2", "format is 2.0"),
        (12, b"\xff\xff\xff\x7f", "head is to have"),
        (24, b"\0\0\0", "checksum of its head"),
    ],
)
def test_a_damage_is_named_with_file_and_offset(tmp_path, tensors, at, change, reason):
    path = tmp_path / "weights.packed"
    packing.write(path, tensors)
    content = bytearray(path.read_bytes())
    content[at : at + len(change)] = change
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as refused:
        PackedFile(path)
    assert f"{path} at byte " in str(refused.value)


def test_a_file_of_a_newer_format_says_to_update(tmp_path, tensors):
    path = tmp_path / "net.packed"
    packing.write(path, tensors)
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"its format is 2.0, this release reads 1.0") as refused:
        PackedFile(path)
    assert refused.value.hint == "update plinth-engine"


def test_a_flipped_bit_names_its_tensor_and_a_short_file_its_end(tmp_path, tensors):
    path = tmp_path / "weights.packed"
    packing.write(path, tensors)
    content = bytearray(path.read_bytes())
    with PackedFile(path) as file:
        entry = file.entries["conv.weight"]
    content[entry.offset + 5] ^= 1
    path.write_bytes(content)
    with PackedFile(path) as file, pytest.raises(ModelError, match=r"conv.weight.*checksum"):
        file.dense("conv.weight")
    path.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=f"the file has {len(content) - 1} bytes, expected"):
        PackedFile(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="at byte 0"):
        PackedFile(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A table that promises far more than a file of its size can hold."""
    path = tmp_path / "weights.packed"
    packing.write(
        path, {"weight": Coded(torch.zeros(8, 64, dtype=torch.int8), torch.ones(8).half())}
    )
    table, inside, behind = packed_mutations._parts(path.read_bytes())
    table[0][2] = [8, 1 << 30]
    path.write_bytes(packed_mutations._joined(table, inside, behind))
    with pytest.raises(ModelError, match="unpack to 34359738368 bytes"):
        PackedFile(path)


def test_five_hundred_damaged_files_end_in_a_refusal_each(tmp_path):
    """``benchmarks/packed_mutations.py`` runs 10,000."""
    found = packed_mutations.run(500, 11, tmp_path)
    assert found.wrong == []
    assert found.refused > 300


def test_a_file_that_was_closed_holds_no_tensor(tmp_path, tensors):
    packing.write(tmp_path / "w.packed", tensors)
    with PackedFile(tmp_path / "w.packed") as closed:
        pass
    assert closed.path.exists()
    assert not is_mapped(torch.zeros(4)), "whoever looks for a tensor's file passes it over"
