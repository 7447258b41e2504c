"""Tensors of the protocol: what is written is read again bit for bit, and nothing else is read."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plinth.engine import InputError
from plinth.pipelines.oip.tensors import (
    DATATYPES,
    from_bytes,
    from_json,
    header_of,
    to_bytes,
    to_json,
)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.sampled_from(sorted(DATATYPES)), SHAPES, st.randoms(use_true_random=False))
def test_any_bytes_are_a_tensor_and_come_back(datatype: str, shape: list[int], random: Any) -> None:
    header = header_of("x", datatype, shape, 1 << 20)
    raw = random.randbytes(header.bytes)
    tensor = from_bytes(header, raw)
    assert tensor.dtype is DATATYPES[datatype]
    assert list(tensor.shape) == shape
    if datatype != "BOOL":  # any byte but 0 is true
        assert bytes(to_bytes(tensor)) == raw
    assert torch.equal(
        from_bytes(header, to_bytes(tensor)).view(torch.uint8), tensor.view(torch.uint8)
    )


@given(st.sampled_from(sorted(DATATYPES)), SHAPES, st.data())
def test_json_says_the_same_as_bytes(datatype: str, shape: list[int], data: st.DataObject) -> None:
    header = header_of("x", datatype, shape, 1 << 20)
    dtype = header.dtype
    if dtype is torch.bool:
        one: Any = st.booleans()
    elif dtype.is_floating_point:
        most = torch.finfo(dtype).max
        one = st.floats(-most, most)
    else:
        one = st.integers(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    values = data.draw(st.lists(one, min_size=header.count, max_size=header.count))
    tensor = from_json(header, values)
    assert torch.equal(tensor.flatten(), torch.tensor(values, dtype=dtype))
    assert torch.equal(from_json(header, to_json(tensor, "x")), tensor)
    nested = from_json(header, tensor.tolist())
    assert torch.equal(nested, tensor)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(DATATYPES)), SHAPES, JSON)
def test_whatever_json_says_is_read_whole_or_refused(
    datatype: str, shape: list[int], data: Any
) -> None:
    header = header_of("x", datatype, shape, 1 << 20)
    with contextlib.suppress(InputError):
        tensor = from_json(header, data)
        assert list(tensor.shape) == shape
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())


def test_texts_are_refused_before_room_is_made_for_the_longest() -> None:
    header = header_of("x", "FP32", [1, 1], 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="not FP32"):
            from_json(header, ["x" * 9_000, *[""] * 9_000])  # 324 MB as an array of texts
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(JSON, JSON, JSON)
def test_a_header_is_right_or_refused(name: Any, datatype: Any, shape: Any) -> None:
    with pytest.raises(InputError):
        header_of(name, datatype, shape, 1 << 20)
