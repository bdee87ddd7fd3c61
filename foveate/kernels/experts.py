"""Mixtures of experts: rows are sorted by their expert, so that each expert is two matmuls over its own rows.

    rows  a b c          each row twice, by expert      a c | b | a b c ...
    chosen 0,2 1,2 0,2   expert 0 | expert 1 | expert 2 ...

On a CPU, experts run one after another, and of those that no row chose nothing is read. On a GPU, torch's grouped
matmul takes all of them at once and nothing waits for the host, where the numbers' format allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.linear import linear

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
"""What each of `foveate.ops.ACTIVATIONS` is."""

ALIGNED = 8
"""Numbers of 16 bits that a row's start must be a multiple of in a grouped matmul."""


def experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, chosen: int, activation: str) -> Tensor:
    """`foveate::experts`."""
    rows = x.reshape(-1, x.shape[-1])
    shares, number = _routes(logits.reshape(-1, logits.shape[-1]), chosen)
    chosen_by = number.flatten()
    order = chosen_by.argsort(stable=True)
    # Not bincount, for which a GPU's host would have to wait.
    counts = chosen_by.new_zeros(len(gate_up)).index_add(0, chosen_by, torch.ones_like(chosen_by))
    run = grouped if _groups(x, gate_up, down) else one_by_one
    out = run(rows[order // chosen], counts, gate_up, down, FUNCTIONS[activation])
    # Back to the rows' own order, where the parts of each stand together.
    parts = torch.empty_like(out).index_copy(0, order, out).view(len(rows), chosen, x.shape[-1])
    return (parts * shares[..., None]).sum(1).view(x.shape)


def _routes(logits: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Of logits [n, E], the shares of each row's chosen experts, and which those are: two of [n, chosen]."""
    shares, number = logits.softmax(-1, dtype=torch.float32).topk(chosen, dim=-1)
    return (shares / shares.sum(-1, keepdim=True)).to(logits.dtype), number


def one_by_one(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows [m, D] in order of their experts, of which expert e has counts[e], through those: [m, D]."""
    done, start = [rows.new_zeros(0, down.shape[1])], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            gate, up = linear(rows[start : start + count], gate_up[expert]).chunk(2, dim=-1)
            done.append(linear(act(gate) * up, down[expert]))
            start += count
    return torch.cat(done)


def grouped(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The same as `one_by_one`, in one matmul for all experts."""
    ends = counts.cumsum(0, dtype=torch.int32)
    both: Tensor = functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, dim=-1)
    out: Tensor = functional.grouped_mm(act(gate) * up, down.transpose(1, 2), offs=ends)
    return out


def _groups(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    aligned = not (gate_up.shape[-1] % ALIGNED or down.shape[-1] % ALIGNED)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned
