"""Calls of neighbour attention: prompts of text and images, ragged and padded as a batch makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.neighbor import dispatch, reference
from foveate.kernels.neighbor.inputs import Inputs
from foveate.neighborhood import Call, Grids
from foveate.ops import PAD

Prompt = list[tuple[int, int, int]]
"""Text tokens, height and width of one image after the other; text behind the last one is never seen."""


@dataclass(frozen=True)
class Case:
    """The arguments of one call by name, and which queries are real."""

    arguments: dict[str, Any]

    @property
    def real(self) -> Tensor:
        return self.arguments["q_order"] != PAD

    def expected(self) -> Tensor:
        return reference.neighbor_attention(**self.arguments)

    def described(self) -> tuple[Call, Grids | None]:
        names = ("q", "k", "grids", "radius", "metric", "causal")
        return dispatch.described(*(self.arguments[name] for name in names))

    def inputs(self) -> Inputs:
        a = self.arguments
        k, v = (dispatch._two(a[name], 2) for name in "kv")
        return Inputs(a["q"], k, v, a["q_order"], dispatch._two(a["k_order"], 1), a["coords"], a["scale"])

    def changed(self, **arguments: Any) -> Case:
        return replace(self, arguments={**self.arguments, **arguments})

    def keeping(self, index: Tensor) -> Case:
        """As if only the visual tokens at index had been kept: the grids then promise nothing."""
        a = self.arguments
        streams = {name: [a[name][0][:, :, index], *a[name][1:]] for name in "kv"}
        order = a["q_order"][:, index]
        return self.changed(
            q=a["q"][:, :, index],
            **streams,
            q_order=order,
            k_order=[order, *a["k_order"][1:]],
            coords=a["coords"][:, index],
        )

    def check(self, actual: Tensor, tolerance: float = 1e-5) -> None:
        assert actual.is_contiguous()
        assert actual.isfinite().all()
        assert actual.dtype == self.arguments["q"].dtype
        real = self.real
        torch.testing.assert_close(actual[real], self.expected()[real], rtol=tolerance, atol=tolerance)


def case(
    prompts: list[Prompt],
    radius: int,
    metric: str = "chebyshev",
    causal: bool = True,
    heads: tuple[int, int] = (2, 2),
    size: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
) -> Case:
    """One batch row a prompt; text is padded on the left, visual tokens on the right."""
    generator = torch.Generator().manual_seed(seed)
    visual = max(sum(h * w for _, h, w in prompt) for prompt in prompts)
    text = max(sum(t for t, _, _ in prompt) for prompt in prompts)
    batch = len(prompts)
    order = torch.full((batch, visual), PAD)
    text_order = torch.full((batch, text), PAD)
    coords = torch.zeros(batch, visual, 3, dtype=torch.int64)
    grids = []
    for b, prompt in enumerate(prompts):
        place = start = 0
        first = begin = text - sum(t for t, _, _ in prompt)
        for image, (t, h, w) in enumerate(prompt):
            text_order[b, begin : begin + t] = torch.arange(place, place + t)
            place, begin = place + t, begin + t
            order[b, start : start + h * w] = torch.arange(place, place + h * w)
            rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
            coords[b, start : start + h * w] = torch.stack([torch.full_like(rows, image), rows, columns], 1)
            grids.append([b, start, h, w, first, begin])
            place, start = place + h * w, start + h * w

    def stream(tokens: int, count: int) -> Tensor:
        x = torch.randn(batch, tokens, count, size, generator=generator).to(dtype).transpose(1, 2)
        return x if transposed else x.contiguous()

    lengths = [visual, text] if text else [visual]
    arguments = {
        "q": stream(visual, heads[0]),
        "k": [stream(n, heads[1]) for n in lengths],
        "v": [stream(n, heads[1]) for n in lengths],
        "q_order": order,
        "k_order": [order, text_order][: len(lengths)],
        "coords": coords,
        "grids": torch.tensor(grids, dtype=torch.int64).view(-1, 6),
        "radius": radius,
        "metric": metric,
        "causal": causal,
        "scale": size**-0.5,
    }
    return Case(arguments)
