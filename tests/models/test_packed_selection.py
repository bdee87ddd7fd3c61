"""Selections where images stand in one sequence: equal to transformers with the other tokens hidden from the start.

Positions stay, so that hiding keys in every layer is the same as never having had the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_window_index

import foveate
from foveate import ops
from foveate.errors import PassError
from foveate.kernels import counting, reference, segments
from foveate.models.packed import merge_of, values_of
from foveate.models.registry import FAMILIES
from tests.ir.test_cost import COUNTED
from tests.models.prompts import made
from tests.models.test_running import optimized, source
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.oracle.vision import best

MODELS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
ROWS = ([[1, 0]], [[2, 0], [0, 0], [1, 1]], [[0, 1]], [[0, 0]])
"""Images in each prompt, and videos."""

Scores = Callable[[Tensor, Tensor], Tensor]
"""What a row [1, n] and tokens [1, n, D] of one image score."""

METHODS: dict[str, tuple[str, float, Scores]] = {
    "fastervlm": ("fastervlm{keep=0.5}", 0.5, lambda row, x: row),
    "vispruner": ("vispruner{keep=0.6,important=0.3}", 0.6, lambda row, x: reference.distinct_scores(row, x, 0.6, 0.3)),
    "divprune": ("divprune{keep=0.4}", 0.4, lambda row, x: reference.diverse_scores(x, 0.4)),
    "cdpruner": (
        "cdpruner{keep=0.4,clip=none}",
        0.4,
        lambda row, x: reference.determinant_scores(x, torch.ones(x.shape[:2]), 0.4),
    ),
}


@contextmanager
def recording(visual: Any) -> Iterator[dict[Any, list[Tensor]]]:
    """What each patch receives, by layer, in each piece that attends within itself: the mean over heads and queries."""
    found: dict[Any, list[Tensor]] = {}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **_: Any) -> Any:
        weights = (q @ k.transpose(2, 3) * scaling).softmax(-1)
        found.setdefault(module, []).append(weights.mean((1, 2))[0])
        return (weights @ v).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("tower_oracle", attend)
    before = visual.config._attn_implementation
    visual.config._attn_implementation = "tower_oracle"
    try:
        yield found
    finally:
        visual.config._attn_implementation = before


def oracle(model: Any, inputs: Mapping[str, Tensor], keep: float, scores: Scores) -> Tensor:
    """Which visual tokens stay: bool [B, S]."""
    ids = inputs["input_ids"]
    visual, config = model.model.visual, model.config.vision_config
    whole = max(getattr(config, "fullatt_block_indexes", [len(visual.blocks) - 1]))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", model.config.image_token_id),
        ("pixel_values_videos", "video_grid_thw", model.config.video_token_id),
    ):
        if inputs.get(pixels) is None:
            continue
        sizes = inputs[grid]
        with recording(visual) as received:
            tokens = visual(inputs[pixels], grid_thw=sizes).pooler_output
        order = torch.arange(len(tokens))
        if hasattr(config, "window_size"):
            sides = config.spatial_merge_size, config.window_size, config.patch_size
            order = get_vision_window_index(sizes, *sides)[0]
        rows = received[visual.blocks[whole].attn]
        kept = torch.zeros(len(tokens), dtype=torch.bool)
        start = 0
        for row in rows:
            per_token = row.unflatten(0, (-1, config.spatial_merge_size**2)).sum(1)[None]
            mine = order[start : start + per_token.shape[1]]
            (places,) = best(scores(per_token, tokens[mine][None]), keep)
            kept[mine[places]] = True
            start += len(mine)
        assert start == len(tokens)
        mask[ids == token] = kept
    return mask


def check(name: str, passes: str, keep: float, scores: Scores, masks: Masks, padding: str) -> None:
    model, mine = source(name), optimized(name, passes)
    for seed, rows in enumerate(ROWS):
        batch = made(model, seed, rows, padding)
        inputs = batch.inputs
        with torch.no_grad():
            stays = oracle(model, inputs, keep, scores)
            held = Masks(
                masks.cut_from,
                None,
                None,
                (Prune(0, keep, "given", given=stays), *masks.prunes),
                masks.neighbors and Neighbors((1, 1), masks.neighbors.radius, coords=batch.coords),
            )
            out, expected = mine(**inputs), masked_forward(model, inputs, held)
            torch.testing.assert_close(out.logits[:, 0], expected.logits, rtol=0, atol=1e-4)
            assert [sorted(x for x in row if x != ops.PAD) for row in out.kept[0].tolist()] == [
                row.nonzero()[:, 0].tolist() for row in stays
            ] or rows == [[0, 0]]
            if padding == "left":
                answer = mine.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
                assert torch.equal(answer, masked_greedy(model, inputs, held, 4)), rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_hides_the_others(name: str, method: str) -> None:
    check(name, *METHODS[method], Masks(), "left")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_with_what_works_in_the_decoder(name: str, padding: str) -> None:
    passes, keep, scores = METHODS["fastervlm"]
    masks = Masks(2, prunes=(Prune(1, 0.5, "fastv"),))
    check(name, f"{passes},fastv{{layer=1,keep=0.5}},cut-visual{{from_layer=2}}", keep, scores, masks, padding)
    masks = Masks(neighbors=Neighbors((1, 1), 1))
    check(name, f"neighbor-attention{{radius=1}},{passes}", keep, scores, masks, padding)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("fastervlm{keep=0.5},divprune{keep=0.5}", "divprune: fastervlm already selects in the vision tower; use one"),
        (
            "cdpruner{clip=/nowhere}",
            "cdpruner: clip must be none: a tower that takes images as one sequence is no CLIP's",
        ),
        ("visionzip", "visionzip: visual tokens cannot be selected so in the vision tower of qwen2_vl: images st"),
        ("tome", "tome: visual tokens cannot be selected so in the vision tower of qwen2_vl"),
    ],
)
def test_what_does_not_fit_is_refused(passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        optimized("qwen2-vl", passes)


def test_the_cost_counts_the_tokens_that_are_left() -> None:
    whole, half = (foveate.cost(optimized("qwen2-vl", p).program, batch=1) for p in ("", "fastervlm{keep=0.5}"))
    assert half.prefill.flops < 0.75 * whole.prefill.flops
    # Another Q K' in a tower of two layers.
    assert whole.vision.flops < half.vision.flops < 1.25 * whole.vision.flops


@pytest.mark.parametrize("method", METHODS)
def test_work_is_what_torch_counts(method: str) -> None:
    """Two nominal images, whose segments have equal lengths."""
    program = optimized("qwen2-vl", METHODS[method][0]).program
    rows, columns = (side * merge_of(program.info) for side in program.info.grid)
    grids = torch.tensor([[1, rows, columns]] * 2)
    pixels = torch.zeros(2 * rows * columns, values_of(program.info))
    given = FAMILIES["qwen2_vl"].vision_given(program.info, {"pixel_values": pixels, "image_grid_thw": grids})
    assert given is not None
    graph = program.graphs["vision"]
    names = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        fx.GraphModule(program.weights, graph)(*(given[name] for name in names))
    assert counter.get_total_flops() == foveate.cost(program, batch=2).vision.flops


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [0, 12, 12, 20, 56]
"""Where segments begin and end: one is empty, one is a single token of four patches."""


@pytest.mark.parametrize("by", ["row", "distinct", "diverse", "determinant"])
def test_each_segment_is_chosen_from_as_if_it_were_alone(by: str) -> None:
    bounds = torch.tensor(LENGTHS)
    x, row = drawn(14, 6, seed=0), drawn(56, seed=1).abs()
    kept = segments.segment_tokens(by, x, row, bounds, 4, 0.5, 0.5)
    for start, end in itertools.pairwise(LENGTHS):
        tokens = x[start // 4 : end // 4]
        alone = segments.segment_tokens(by, tokens, row[start:end], torch.tensor([0, end - start]), 4, 0.5, 0.5)
        assert torch.equal(kept[start // 4 : end // 4], alone) and int(alone.sum()) == len(tokens) // 2
    torch.library.opcheck(ops.segment_tokens, (by, x, row, bounds, 4, 0.5, 0.5), test_utils=("test_schema",))
    with FlopCounterMode(display=False) as counter:
        segments.segment_tokens(by, x, row, bounds, 4, 0.5, 0.5)
    assert counter.get_total_flops() == counting.FLOPS["segment_tokens"](by, x, row, bounds, 4, 0.5, 0.5)


def test_means_are_those_of_each_segment() -> None:
    q, k, bounds = drawn(1, 3, 56, 5, seed=0), drawn(1, 3, 56, 5, seed=1), torch.tensor(LENGTHS)
    found = segments.segment_means(q, k, bounds, 0.4)
    for start, end in itertools.pairwise(LENGTHS):
        if start < end:
            alone = reference.column_means(q[:, :, start:end], k[:, :, start:end], 0.4)[0]
            torch.testing.assert_close(found[start:end], alone)
    assert segments.segment_means(q[:, :, :0], k[:, :, :0], torch.zeros(1), 0.4).shape == (0,)
    torch.library.opcheck(ops.segment_means, (q, k, bounds, 0.4), test_utils=("test_schema",))
    with FlopCounterMode(display=False) as counter:
        segments.segment_means(q, k, bounds, 0.4)
    assert counter.get_total_flops() == counting.FLOPS["segment_means"](q, k, bounds, 0.4)
