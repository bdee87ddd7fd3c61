"""`foveate::neighbor_attention`: reads what is promised, asks the plan for a form and runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.kernels.neighbor import blocks, tiles
from foveate.kernels.neighbor.inputs import Inputs
from foveate.kernels.neighbor.triton_launch import backward, forward
from foveate.kernels.neighbor.triton_support import available, supports
from foveate.neighborhood import METRICS, Call, Grids, Plan, plan, read_grids


def triton(inputs: Inputs, call: Call, images: Grids | None, layout: Any) -> Tensor:
    """By the Triton kernel, which cuts the images itself."""
    text_k, text_v = (x[1] if call.text else None for x in (inputs.k, inputs.v))
    options = (_rows(images), call.radius, call.metric, call.causal, inputs.scale)
    return forward(inputs.q, inputs.k[0], inputs.v[0], text_k, text_v, *options)[0]


def triton_gradients(
    grad: Tensor,
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    coords: Tensor,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> list[Tensor] | None:
    """Gradients of q, of all k and of all v by the Triton kernels; None where another form computes the call."""
    if not q.numel() or planned(q, k, grids, radius, metric, causal).form != "triton":
        return None
    _, images = described(q, k, grids, radius, metric, causal)
    text_k, text_v = (x[1] if len(x) > 1 else None for x in (k, v))
    options = (_rows(images), radius, metric, causal, scale)
    o, lse = forward(q, k[0], v[0], text_k, text_v, *options)
    dq, dk, dv, text_dk, text_dv = backward(grad, q, k[0], v[0], text_k, text_v, o, lse, *options)
    return [x.contiguous() for x in (dq, dk, text_dk, dv, text_dv) if x is not None]


def _rows(images: Grids | None) -> Tensor:
    """The images as the op's `grids`."""
    return torch.tensor([astuple(image) for image in images or ()], dtype=torch.int64).view(-1, 6)


FORMS: dict[str, Callable[[Inputs, Call, Grids | None, Any], Tensor]] = {
    "blocks": blocks.attend,
    "tiles": tiles.attend,
    "triton": triton,
}
"""Form -> what computes it from the tensors, the call, its images, and the layout that the plan chose for it."""


def neighbor_attention(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    coords: Tensor,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> Tensor:
    """`foveate::neighbor_attention`; shapes as in `foveate.ops`."""
    call, images = described(q, k, grids, radius, metric, causal)
    if not q.numel():
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    chosen = plan(call, images, no_triton(q, k, grids, metric))
    inputs = Inputs(q, _two(k, 2), _two(v, 2), q_order, _two(k_order, 1), coords, scale)
    return FORMS[chosen.form](inputs, call, images, chosen.layout)


def planned(q: Tensor, k: list[Tensor], grids: Tensor, radius: int, metric: str, causal: bool) -> Plan:
    """The form for such a call here and its layout; `.explain()` says why the other forms do not compute it."""
    return plan(*described(q, k, grids, radius, metric, causal), no_triton(q, k, grids, metric))


def no_triton(q: Tensor, k: list[Tensor], grids: Tensor, metric: str) -> str:
    """Why Triton cannot compute such a call; empty if it can."""
    if q.device.type != "cuda":
        return f"does not run on {q.device.type}"
    if not available(q.device):
        return "Triton is not installed, or the GPU's compute capability is below 8.0"
    return supports(q, k[0], k[1] if len(k) > 1 else None, grids, metric) or ""


def described(
    q: Tensor, k: list[Tensor], grids: Tensor, radius: int, metric: str, causal: bool
) -> tuple[Call, Grids | None]:
    """The integers of a call, and its images if they are promised; checked."""
    batch, heads, tokens, size = q.shape
    text = k[1].shape[2] if len(k) > 1 else 0
    if metric not in METRICS:
        raise InputError(f"metric of neighbor_attention must be one of {', '.join(METRICS)}, it is {metric!r}")
    if radius < 0:
        raise InputError(f"radius of neighbor_attention must not be negative, it is {radius}")
    if k[0].shape[2] != tokens:
        raise InputError(
            f"neighbor_attention has {tokens} visual queries and {k[0].shape[2]} visual keys: not the same"
        )
    images = read_grids(grids.tolist(), tokens)
    if images and len(k) == 1:
        images = tuple(replace(grid, text_start=0, text_stop=0) for grid in images)
    for grid in images or ():
        if not (0 <= grid.row < batch and 0 <= grid.text_start <= grid.text_stop <= text):
            raise InputError(f"{grid} of neighbor_attention is outside its {batch} batch rows and {text} text keys")
    call = Call(q.device.type, q.dtype, batch, heads, k[0].shape[1], size, tokens, text, radius, metric, causal)
    return call, images


def _two(streams: list[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """The visual and the text stream, of no token if there is none."""
    return streams[0], streams[1] if len(streams) > 1 else streams[0].narrow(dim, 0, 0)
