"""Selections that the text guides, and by likeness, in standard operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import ops
from foveate.errors import BackendError
from foveate.kernels import guided
from foveate.models.random import random_llava
from tests.backends.onnx.agree import assert_agrees, by_runtime

PASSES = (
    "dart{layer=1,keep=0.5}",
    "fitprune{schedule=[0,3,2,2,1,0]}",
    "neighbor-attention{radius=1,layers=[1]},fitprune{schedule=[0,3,2,2,1,0]}",
    "sparsevlm{layers=[0,2],keeps=[0.5,0.3]}",
    "sparsevlm{layers=[0,2],keeps=[0.5,0.3],recycle=false}",
)


@pytest.fixture(scope="module", params=[None, 2], ids=["mha", "gqa"])
def traced(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = random_llava(layers=6, kv_heads=request.param)
    return model, foveate.trace(model)


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_prompts_and_answers_are_those_of_eager(traced: tuple[Any, Any], passes: str) -> None:
    assert_agrees(*traced, passes)


def test_ranks_are_refused(traced: tuple[Any, Any]) -> None:
    model, program = traced
    with pytest.raises(BackendError, match=r"rater_rank.*has no form in standard operators"):
        foveate.optimize(model, "sparsevlm{layers=[0,2],counts=rank,scale=0.5}", traced=program, backend="onnx")


def rows(counts: tuple[int, ...], size: int, start: int = 0) -> Tensor:
    """Orders of rows with so many tokens, padded on the left."""
    order = torch.full((len(counts), size), ops.PAD)
    for row, count in enumerate(counts):
        order[row, size - count :] = torch.arange(start, start + count)
    return order


CASES = [((120, 75, 0, 1), 0.4, 0.4), ((120, 111, 9, 40), 0.0, 0.0), ((7, 7, 7, 7), 1.0, 1.0), ((0, 0, 0, 0), 0.5, 0.5)]


@pytest.mark.parametrize(("counts", "keep", "share"), [*CASES, ((40, 23, 17, 1), 0.2, 0.5)])
def test_clusters_are_those_of_the_kernel(counts: tuple[int, ...], keep: float, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    size = max(counts)
    order, x = rows(counts, size), torch.randn(len(counts), size, 24, generator=generator)
    # Tokens that are all alike have no distance, whichever way it is computed.
    x[:, size // 2 : size // 2 + 3] = 1.5
    scores = torch.rand(len(counts), size, generator=generator).mul(50).round().div(50)
    whole = order if keep == share else rows(tuple(2 * n for n in counts), 2 * size)
    wanted = guided.recycle_tokens(scores, order, x, whole, keep)
    found = by_runtime(ops.recycle_tokens, scores, order, x, whole, keep)
    assert all(torch.equal(a, b) for a, b in zip(wanted[:2], found[:2], strict=True))
    torch.testing.assert_close(found[2], wanted[2])


@pytest.mark.parametrize(("counts", "keep"), [case[:2] for case in CASES])
def test_dart_picks_what_the_kernel_picks(counts: tuple[int, ...], keep: float) -> None:
    generator = torch.Generator().manual_seed(2)
    size, batch = max(counts), len(counts)
    order, text_order = rows(counts, size), rows((5, 1, 5, 3), 6, size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator)

    given = (draw(2, size, 8), draw(size, 16), order, draw(2, 6, 8), draw(6, 16), text_order, keep, 4)
    assert torch.equal(guided.dart_scores(*given), by_runtime(ops.dart_scores, *given))
