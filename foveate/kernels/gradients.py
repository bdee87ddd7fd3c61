"""Gradients of the `foveate::` ops: the backward computes the op once more and differentiates that.

    forward     out = op(inputs)                     saves the inputs, nothing else
    backward    grads = op_backward(grad, inputs)    out = implementation(inputs) with autograd, then its gradients

So memory is what one op's own blocks need, while its gradients are computed. The backward is an op of its own, which
keeps graph compilers out of it as the forward does. Integer inputs (orders, indices) have no gradient, and a second
derivative is not offered. What only chooses returns places and constants: nothing flows through that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from foveate.ops import LIBRARY


def constant(name: str) -> None:
    """Say that nothing flows through `foveate::name`, whatever it was computed from."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def differentiable(
    name: str, implementation: Callable[..., Any], special: Callable[..., list[Tensor] | None] | None = None
) -> None:
    """Register the gradient of `foveate::name`, of the first tensor that it returns; implementation: plain torch.

    Defines `foveate::name_backward`: the gradient of the result, then the op's own arguments, to the gradients of all
    floating-point ones in order. special: the same by kernels of its own; it returns None where they do not apply.
    """
    op = getattr(torch.ops.foveate, name).default
    arguments = str(op._schema).partition("(")[2].rpartition(") ->")[0]
    LIBRARY.define(f"{name}_backward(Tensor grad, {arguments}) -> Tensor[]")
    backward_op = getattr(torch.ops.foveate, f"{name}_backward").default

    def compute(grad: Tensor, *args: Any) -> list[Tensor]:
        found = None if special is None else special(grad, *args)
        if found is not None:
            return found
        flat, spec = tree_flatten(args)
        flat = [x.detach().requires_grad_() if _has_gradient(x) else x for x in flat]
        wanted = [x for x in flat if _has_gradient(x)]
        with torch.enable_grad():
            result = implementation(*tree_unflatten(flat, spec))
        out = result[0] if isinstance(result, tuple) else result
        # An empty result depends on nothing.
        grads = torch.autograd.grad(out, wanted, grad, allow_unused=True) if out.requires_grad else [None] * len(wanted)
        return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(wanted, grads, strict=True)]

    def fake(grad: Tensor, *args: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in tree_flatten(args)[0] if _has_gradient(x)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat, ctx.spec = tree_flatten(inputs)
        ctx.saved = [isinstance(x, Tensor) for x in flat]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.save_for_backward(*(x for x in flat if isinstance(x, Tensor)))

    def backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        flat = [next(tensors) if saved else x for saved, x in zip(ctx.saved, ctx.constants, strict=True)]
        grads = iter(backward_op(grad, *tree_unflatten(flat, ctx.spec)))
        result: tuple[Any, ...] = tree_unflatten([next(grads) if _has_gradient(x) else None for x in flat], ctx.spec)
        # What was left to a default was no input, and torch wants as many gradients as there were inputs.
        return result[: len(ctx.needs_input_grad)]

    LIBRARY.impl(f"{name}_backward", compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foveate::{name}_backward", fake, lib=LIBRARY)
    torch.library.register_autograd(f"foveate::{name}", backward, setup_context=setup, lib=LIBRARY)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these, so that nothing may be written in place."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
