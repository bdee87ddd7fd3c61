"""Attention of packed sequences: against the reference, segment by segment, and with bounds that do not fit."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import ops
from foveate.errors import InputError
from foveate.kernels import attention as kernels
from foveate.kernels import reference

SCALE = 0.4


def packed(lengths: list[int], heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, heads, all tokens, 8] and the bounds of segments of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, generator=generator) for _ in range(3))
    return q, k, v, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), heads=st.integers(1, 3), wide=st.booleans())
def test_any_segments_equal_the_reference(lengths: list[int], heads: int, wide: bool) -> None:
    q, k, v, bounds = packed(lengths, heads)
    bounds = bounds.long() if wide else bounds
    actual = kernels.varlen_attention(q, k, v, bounds, SCALE)
    assert actual.shape == (1, sum(lengths), heads, 8)
    torch.testing.assert_close(actual, reference.varlen_attention(q, k, v, bounds, SCALE), rtol=1e-5, atol=1e-5)


def test_a_segment_is_attended_as_if_it_were_alone() -> None:
    q, k, v, bounds = packed([5, 3, 8])
    together = kernels.varlen_attention(q, k, v, bounds, SCALE)
    for start, stop in pairwise(bounds.tolist()):
        alone = kernels.encoder_attention(*(x[:, :, start:stop] for x in (q, k, v)), SCALE)
        torch.testing.assert_close(together[:, start:stop], alone)
    whole = kernels.encoder_attention(q, k, v, SCALE)
    assert not torch.allclose(together, whole, atol=1e-2), "segments must not see each other"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_is_near(dtype: torch.dtype) -> None:
    q, k, v, bounds = packed([6, 10])
    actual = kernels.varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), bounds, SCALE)
    assert actual.dtype == dtype
    expected = reference.varlen_attention(q, k, v, bounds, SCALE)
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 9], [0, 6, 4, 9], [0, 12], [9]])
def test_bounds_that_do_not_fit_the_sequence_are_refused(bounds: list[int]) -> None:
    q, k, v, _ = packed([9])
    with pytest.raises(InputError, match=r"cu_seqlens must rise from 0 to the 9 tokens of the sequence, it is \["):
        kernels.varlen_attention(q, k, v, torch.tensor(bounds), SCALE)


def test_the_op_keeps_its_contract() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.varlen_attention, (*packed([4, 0, 3]), SCALE), test_utils=checks)
