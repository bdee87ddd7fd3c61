"""Caches that tokens leave, in standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import ops
from foveate.backends.onnx.names import input_name, named_outputs
from foveate.kernels import kv
from foveate.models.random import random_llava
from tests.backends.onnx.agree import assert_agrees, by_runtime

PASSES = (
    "snapkv{capacity=8,window=4}",
    "snapkv{capacity=0.4,window=4,pooling=max,kernel=3}",
    "neighbor-attention{radius=1,layers=[1]},snapkv{capacity=8,window=4}",
    "heavy-recent{heavy=4,recent=4}",
    "heavy-recent{heavy=0.2,recent=0.3}",
)


@pytest.fixture(scope="module", params=[None, 2], ids=["mha", "gqa"])
def traced(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = random_llava(layers=4, kv_heads=request.param)
    return model, foveate.trace(model)


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_prompts_and_answers_are_those_of_eager(traced: tuple[Any, Any], passes: str) -> None:
    assert_agrees(*traced, passes)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["heavy-recent{heavy=4,recent=4}", "snapkv{capacity=8,window=4}"])
def test_a_package_agrees_too(tmp_path: Path, passes: str) -> None:
    exported = foveate.export(foveate.optimize(random_llava(layers=2), passes), output=tmp_path / "package")
    assert exported.parity is not None and exported.parity.ok


def test_names_of_held_blocks() -> None:
    program = foveate.optimize(random_llava(layers=1), "heavy-recent{heavy=4,recent=4}").program
    block = ["held.0.key", "held.0.value"]
    assert list(named_outputs("prefill", program.prefill))[1:] == [
        *block,
        "held.0.places",
        "held.0.sums",
        "held.0.budget",
    ]
    step = program.graphs["decode"]
    assert list(named_outputs("decode", step))[1:] == ["new.0.key", "new.0.value", "scores.0"]
    taken = [input_name("decode", str(n.target)) for n in step.nodes if n.op == "placeholder"]
    assert taken[-3:] == [*block, "held_order_0"]


def orders(*counts: tuple[int, ...]) -> list[Tensor]:
    """Orders of streams with so many tokens a row, one stream behind the other, padded on the left."""
    start, found = 0, []
    for each in counts:
        order = torch.full((len(each), max(each)), ops.PAD)
        for row, count in enumerate(each):
            order[row, max(each) - count :] = torch.arange(start, start + count)
        start += max(each)
        found.append(order)
    return found


STREAMS = [orders((20, 0, 9), (12, 5, 3)), orders((0, 0, 0), (6, 2, 1))]


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("given", [(6, 4, 5, "avg"), (0.3, 2, 3, "max"), (100, 4, 7, "avg"), (4, 4, 1, "max")])
def test_snapkv_keeps_what_the_kernel_keeps(streams: list[Tensor], given: tuple[Any, ...]) -> None:
    scores = torch.rand(3, 2, sum(x.shape[1] for x in streams), generator=torch.Generator().manual_seed(3))
    scores = scores.mul(16).round() / 16  # sums of few bits, so that equal means are equal both ways
    found, wanted = by_runtime(ops.snapkv_tokens, scores, streams, *given), kv.snapkv_tokens(scores, streams, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("given", [(4, 3), (0.29, 0.31), (100, 2), (0.5, 3)])
def test_heavy_tokens_are_those_of_the_kernel(streams: list[Tensor], given: tuple[float, float]) -> None:
    sums = torch.rand(3, 2, sum(x.shape[1] for x in streams), generator=torch.Generator().manual_seed(4)).mul(9).round()
    found, wanted = by_runtime(ops.heavy_tokens, sums, streams, *given), kv.heavy_tokens(sums, streams, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("window", [1, 4, 50])
def test_windows_are_those_of_the_kernel(window: int) -> None:
    for first, *others in [*STREAMS, *(streams[::-1] for streams in STREAMS)]:
        found, wanted = by_runtime(ops.window_tokens, first, others, window), kv.window_tokens(first, others, window)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("see_text", [True, False])
@pytest.mark.parametrize("metric", ["chebyshev", "euclidean", "raster"])
def test_neighbors_pay_what_they_pay_in_the_kernel(see_text: bool, metric: str) -> None:
    generator = torch.Generator().manual_seed(5)
    streams = orders((9, 0, 4), (5, 3, 1))
    numbers = torch.arange(9)
    coords = torch.stack([numbers // 6, numbers // 3, numbers % 3], 1).expand(3, -1, -1).contiguous()
    chosen = torch.tensor([[1, 4, 8]] * 3)
    q_order = streams[0].gather(1, chosen)
    q_coords = coords[:, chosen[0]].contiguous()
    q = torch.randn(3, 4, 3, 8, generator=generator)
    k = [torch.randn(3, 2, x.shape[1], 8, generator=generator) for x in streams]
    given = (q, k, q_order, streams, q_coords, coords, 1, metric, not see_text, see_text, 0.3)
    torch.testing.assert_close(by_runtime(ops.neighbor_sums, *given), kv.neighbor_sums(*given), rtol=1e-5, atol=1e-6)
