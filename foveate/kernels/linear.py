"""Linears in fp32 on CPUs where `torch.nn.functional.linear` is not the fastest that torch carries.

That function calls MKL, which leaves the wide vector units of AMD's processors idle; oneDNN does not: 1.2 to 2 times as
fast on an EPYC, most of all where tokens are few, with the weight as it is. It takes whole rows only, so a part of a
weight's columns is copied for the call, which is worth it unless there are very few tokens.

oneDNN packs the second of its two factors for each call. Where tokens are few, that takes much of the time if it is the
weight, so the two change places, and no copy of a weight is kept: 1.1 to 1.5 times as fast with 4 to 32 tokens on an
EPYC without AVX-512; on one with it, from 16 tokens on, most with large weights. What comes out lies column by column
then. Putting it in order takes about a tenth of the time with 64 tokens, so a caller whose next step is elementwise and
another linear takes it as it is: an FFN over 64 tokens gains 1.1 to 1.2 times over the weight in the second place.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.gradients import recorded
from foveate.kernels.processor import cpu_name
from foveate.kernels.scratch import scratch

LARGE = 2**18
"""Elements of a weight from which on oneDNN gains more than its calls take."""

MANY = 32
"""Tokens from which on it gains more than copying a part of a weight takes."""

FEW = range(16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4, 65)
"""Numbers of tokens for which it is faster to pack them than to pack a weight, which has more rows than that."""


@functools.cache
def pays() -> bool:
    """Whether oneDNN is here and this CPU is one on which it is the faster of the two."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and "AMD" in cpu_name()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, ordered: bool = True) -> Tensor:
    """As `torch.nn.functional.linear`: x [..., columns], weight [rows, columns] -> [..., rows].

    ordered=False: the result may lie in memory column by column, which is faster where tokens are few.
    """
    if pays() and _fits(x, weight, bias) and _large(x, weight):
        return _onednn(x, _whole(weight), bias, ordered)
    return functional.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes the same: fp32 on a CPU, with nothing to differentiate or to cast."""
    if not (x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"):
        return False
    if recorded(x, weight, bias):
        return False
    return not torch.is_autocast_enabled("cpu")


def _large(x: Tensor, weight: Tensor) -> bool:
    tokens = x.numel() // max(1, weight.shape[1])
    return weight.numel() >= LARGE and tokens >= (1 if weight.is_contiguous() else MANY)


def _whole(weight: Tensor) -> Tensor:
    """A part of a weight's columns, copied to where it lies row by row."""
    if weight.is_contiguous():
        return weight
    return scratch("weight", weight.shape, weight).copy_(weight)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, ordered: bool) -> Tensor:
    tokens = x.numel() // weight.shape[1]
    if bias is None and tokens in FEW and weight.shape[0] >= FEW.stop:
        flat = x.reshape(tokens, weight.shape[1])
        # oneDNN packs tokens that lie column by column as fast; any other strides would take it ages.
        flat = flat if flat.t().is_contiguous() else flat.contiguous()
        out = _product(weight, flat, None).t().view(1, *x.shape[:-1], weight.shape[0])
        # With a third axis torch puts it in order on all threads; with two, on one.
        return (out.contiguous() if ordered else out)[0]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
