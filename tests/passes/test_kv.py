"""Both cache policies behind other passes, saved, generating, compiled, trained, and priced."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import PassError
from foveate.models.random import random_inputs
from foveate.passes import (
    CutVisual,
    DivPrune,
    DropVisualHeads,
    DropVisualNeurons,
    FastV,
    HeavyRecent,
    NeighborAttention,
    Pass,
    PyramidDrop,
    SnapKV,
    parse_pipeline,
)
from tests.ir.test_cost import COUNTED
from tests.oracle import kv, vision
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import TOLERANCE, optimize
from tests.passes.conftest import FFN, LAYERS
from tests.passes.stepwise import check, stepwise
from tests.passes.test_vision import by, diverse, everything

LONG: tuple[dict[str, Any], ...] = (
    {"text_tokens": 24},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left", "text_tokens": 14},
    {"batch": 3, "padding": "right"},
)

ORACLES = {
    "snapkv": (SnapKV(12, 7), lambda: kv.SnapKV(12, 7)),
    "heavy-recent": (HeavyRecent(0.3, 4), lambda: kv.HeavyRecent(0.3, 4)),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    ("passes", "masks"),
    [
        ([CutVisual(2)], Masks(cut_from=2)),
        ([CutVisual(0)], Masks(cut_from=0)),
        ([FastV(2, 0.4), CutVisual(3)], Masks(cut_from=3, prunes=(Prune(2, 0.4, "fastv"),))),
        ([PyramidDrop((1, 3), 0.6)], Masks(prunes=(Prune(1, 0.6, "pyramid", of=1), Prune(3, 0.36, "pyramid", of=1)))),
        ([NeighborAttention(1)], Masks(neighbors=Neighbors((4, 4), 1))),
        (
            [NeighborAttention(1, "raster", causal=True, see_prefix=False), FastV(1, 0.7)],
            Masks(
                neighbors=Neighbors((4, 4), 1, "raster", causal=True, see_prefix=False),
                prunes=(Prune(1, 0.7, "fastv"),),
            ),
        ),
    ],
    ids=["cut", "blind", "fastv, cut", "pyramiddrop", "neighbors", "raster, fastv"],
)
def test_behind_other_passes(gqa: Any, name: str, passes: list[Pass], masks: Masks) -> None:
    policy, makes = ORACLES[name]
    check(gqa, [*passes, policy], makes, masks, LONG)


@pytest.mark.parametrize("name", ORACLES)
def test_behind_fewer_neurons_and_a_shorter_prompt(gqa: Any, name: str) -> None:
    policy, makes = ORACLES[name]
    neurons = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    neurons[:, : FFN // 2] = True
    check(gqa, [DropVisualNeurons(0.5), policy], makes, Masks(neurons=neurons), LONG)
    inputs = random_inputs(gqa, seed=2, text_tokens=20)
    tokens = torch.tensor([[5, 6, 7, 8]])
    shown = by(everything, diverse(0.5))(gqa, inputs["pixel_values"])
    with ExitStack() as stack:
        stack.enter_context(vision.showing(gqa, shown))
        short = vision.shorten(gqa, inputs, shown)
        expected = kv.decoded(gqa, short.inputs, Masks(), makes, tokens, 2)
    places = [[[[short.places[0][p] for p in head] for head in row] for row in layer] for layer in expected.held[0]]
    for passes in ([DivPrune(0.5), policy], [policy, DivPrune(0.5)]):
        logits, held, _ = stepwise(optimize(gqa, passes), inputs, tokens)
        torch.testing.assert_close(torch.cat(logits), torch.cat(expected.logits), atol=TOLERANCE, rtol=TOLERANCE)
        assert held == places


def test_heads_that_see_different_tokens_are_refused(gqa: Any) -> None:
    for name in ORACLES:
        with pytest.raises(PassError, match="some heads of layer 2 see no visual tokens"):
            optimize(gqa, [DropVisualHeads(keep=2), ORACLES[name][0]])
        for later in (CutVisual(2), DropVisualHeads(keep=2), FastV(2), ORACLES[name][0]):
            with pytest.raises(PassError, match="put the pass that does so last"):
                optimize(gqa, [ORACLES[name][0], later])


@pytest.mark.parametrize("name", ORACLES)
def test_no_head_at_all_sees_the_image(gqa: Any, name: str) -> None:
    """Then text alone is cached in those layers."""
    policy, makes = ORACLES[name]
    heads = torch.ones(LAYERS, 4, dtype=torch.bool)
    heads[2:] = False
    check(gqa, [DropVisualHeads(keep=0), policy], makes, Masks(heads=heads), LONG)


@pytest.mark.parametrize("name", ORACLES)
def test_a_prompt_that_ends_in_an_image_and_one_of_one_token(gqa: Any, name: str) -> None:
    policy, makes = ORACLES[name]
    whole = random_inputs(gqa, seed=8, text_tokens=4)
    ends = {**whole, **{key: whole[key][:, :-1] for key in ("input_ids", "attention_mask")}}
    one = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
    tokens = torch.tensor([[5, 6, 7, 8, 9, 4, 3]])
    for inputs in (ends, one):
        expected = kv.decoded(gqa, inputs, Masks(), makes, tokens, 2)
        logits, held, _ = stepwise(optimize(gqa, [policy]), inputs, tokens)
        torch.testing.assert_close(torch.cat(logits), torch.cat(expected.logits), atol=TOLERANCE, rtol=TOLERANCE)
        assert held == expected.held[0]


@pytest.mark.parametrize("name", ORACLES)
def test_saved_and_loaded(gqa: Any, name: str, tmp_path: Any) -> None:
    optimized = optimize(gqa, [CutVisual(3), ORACLES[name][0]])
    optimized.save_pretrained(tmp_path / "saved")
    loaded = foveate.load(tmp_path / "saved")
    inputs = random_inputs(gqa, batch=2, text_tokens=20)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        assert torch.equal(optimized.generate(**inputs, **options), loaded.generate(**inputs, **options))


@pytest.mark.parametrize("name", ORACLES)
def test_generate_in_every_way(gqa: Any, name: str) -> None:
    """Greedy search is stepwise decoding; beams are rows that are held together with their caches."""
    optimized = optimize(gqa, [ORACLES[name][0]])
    inputs = random_inputs(gqa, batch=3, images_per_row=[2, 0, 1], padding="left", text_tokens=14)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        greedy = optimized.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, length:]
        logits, _, _ = stepwise(optimized, inputs, greedy)
        assert torch.equal(torch.stack(logits[:-1], 1).argmax(-1), greedy)
        options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
        beams = optimized.generate(**inputs, max_new_tokens=12, min_new_tokens=12, **options)
        torch.manual_seed(0)
        optimized.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=True)
        logits, _, _ = stepwise(optimized, inputs, beams.sequences[:, length:])
    # The score of a beam is the mean log-probability of its tokens, given each other.
    chosen = torch.stack(logits[:-1], 1).log_softmax(-1).gather(2, beams.sequences[:, length:, None])[..., 0]
    torch.testing.assert_close(chosen.mean(1), beams.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ORACLES)
def test_flops_are_those_that_run(gqa: Any, name: str) -> None:
    """Also by what torch counts inside the ops, as they run."""
    passes = [NeighborAttention(1), ORACLES[name][0]]
    for chosen in (passes, passes[1:]):
        optimized = optimize(gqa, chosen)
        inputs = random_inputs(gqa, batch=2, text_tokens=20, prefix=6)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            optimized(**inputs)
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=COUNTED) as within:
            out = optimized(**inputs)
        spent = foveate.cost(optimized.program, text_tokens=20, prefix_tokens=6, batch=2, past_tokens=20)
        assert counter.get_total_flops() == within.get_total_flops() == spent.first_token_flops
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            optimized(input_ids=torch.tensor([[5], [6]]), past_key_values=out.past_key_values)
        assert counter.get_total_flops() == spent.decode.flops


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("new", [0, 3, 40])
def test_bytes_are_those_that_are_promised(gqa: Any, name: str, new: int) -> None:
    optimized = optimize(gqa, [CutVisual(2), ORACLES[name][0]])
    inputs = random_inputs(gqa, batch=2, text_tokens=20)
    _, _, cache = stepwise(optimized, inputs, torch.full((2, new), 5))
    spent = foveate.cost(optimized.program, text_tokens=20, batch=2, new_tokens=new)
    assert cache.nbytes() == spent.kv_bytes


def test_tokens_at_once_are_tokens_one_by_one(gqa: Any) -> None:
    inputs = random_inputs(gqa, batch=3, padding="left")
    tokens = torch.randint(3, 40, (3, 12))
    for name in ORACLES:
        optimized = optimize(gqa, [ORACLES[name][0]])
        logits, _, one = stepwise(optimized, inputs, tokens)
        with torch.inference_mode():
            many = optimized(**inputs).past_key_values
            for part in tokens.split(5, 1):
                last = optimized(input_ids=part, past_key_values=many).logits[:, 0]
        torch.testing.assert_close(last, logits[-1], atol=1e-5, rtol=1e-5)
        assert many.get_seq_length() == one.get_seq_length()


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_inductor(gqa: Any, name: str) -> None:
    optimized = optimize(gqa, [ORACLES[name][0]])
    compiled = foveate.optimize(gqa, [ORACLES[name][0]], backend="inductor")
    tokens = torch.tensor([[5, 6, 7, 8]] * 2)
    for prompt in ({"batch": 2, "text_tokens": 24}, {"batch": 2, "text_tokens": 4}):
        inputs = random_inputs(gqa, **prompt)
        pair = [torch.stack(stepwise(m, inputs, tokens)[0]) for m in (optimized, compiled)]
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


BAD = {
    "snapkv{capacity=32}": "above window=32",
    "snapkv{capacity=1.0}": "a share of them between 0 and 1",
    "snapkv{capacity=0}": "above window",
    "snapkv{window=0}": "1 or more",
    "snapkv{kernel=4}": "an odd number",
    "snapkv{kernel=-1}": "an odd number",
    "snapkv{kernel=3.0}": "an odd number",
    "snapkv{pooling=mean}": "avg, max",
    "heavy-recent{heavy=-1}": "a number of tokens, 0 or more",
    "heavy-recent{heavy=1.5}": "between 0 and 1",
    "heavy-recent{recent=0}": "1 or more",
    "heavy-recent{recent=1.0}": "between 0 and 1",
}


@pytest.mark.parametrize("passes", BAD)
def test_bad_options_are_refused(passes: str) -> None:
    with pytest.raises(PassError) as error:
        parse_pipeline(passes)
    assert BAD[passes] in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_training_does_not_see_it(gqa: Any, name: str) -> None:
    inputs = random_inputs(gqa, batch=2)
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 24, -100)
    pair = [optimize(gqa, [CutVisual(2), *more])(**inputs, labels=labels).loss for more in ([], [ORACLES[name][0]])]
    assert torch.equal(*pair)


def test_diffs_and_notes_say_what_is_cached(gqa: Any) -> None:
    dense, snap = optimize(gqa, []), optimize(gqa, [SnapKV(0.4)])
    text = foveate.diff(dense.program, snap.program).to_text()
    assert "one block of both streams' keys and values cached" in text
    text = " ".join(foveate.diff(snap.program, optimize(gqa, [SnapKV(0.5)]).program).to_text().split())
    assert "floor(0.4*(visual_tokens + text_tokens))" in text
    assert "at most floor(0.4 x tokens) keys a head of the prompt" in " ".join(str(snap.report()).split())
    heavy = " ".join(str(optimize(gqa, [HeavyRecent(9, 0.1)]).report()).split())
    assert "at most 9 keys a head by what was paid to them, and the last ceil(0.1 x tokens)" in heavy
