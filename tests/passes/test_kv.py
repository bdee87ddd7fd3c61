"""Cache policies: every decode step equals the Hugging Face model masked to what a list keeps, head by head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.cache import HeavyRecentCache, VisualTextCache
from foveate.errors import FoveateWarning, InputError, PassError
from foveate.ir.rules import verify
from foveate.ir.split import structure
from foveate.ir.text import parse_graphs
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from foveate.ops import PAD
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
    pipeline_text,
)
from tests.ir.test_cost import COUNTED
from tests.oracle import kv, vision
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import PROMPTS, TOLERANCE, optimize
from tests.passes.conftest import FFN, LAYERS
from tests.passes.test_vision import by, diverse, everything

STEPS = 5

LONG: tuple[dict[str, Any], ...] = (
    {"text_tokens": 24},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left", "text_tokens": 14},
    {"batch": 3, "padding": "right"},
)


def check(
    model: Any,
    passes: Sequence[Pass],
    makes: Any,
    masks: Masks | None = None,
    prompts: Sequence[dict[str, Any]] = PROMPTS,
    steps: int = STEPS,
) -> OptimizedModel:
    """Hold prefill and decode steps of random tokens against the oracle, and what each head holds."""
    assert parse_pipeline(pipeline_text(passes)) == list(passes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FoveateWarning)
        optimized = optimize(model, passes)
    program = optimized.program
    verify(program)
    for name in ("vision", "prefill"):
        assert structure(parse_graphs(program, program.to_text(name))[name]) == structure(program.graphs[name])
    for number, prompt in enumerate(prompts):
        inputs = random_inputs(model, seed=number, **prompt)
        tokens = torch.randint(3, 40, (len(inputs["input_ids"]), steps), generator=torch.Generator().manual_seed(1))
        expected = kv.decoded(model, inputs, masks or Masks(), makes, tokens, program.info.kv_heads)
        logits, held, cache = stepwise(optimized, inputs, tokens)
        for step, (mine, theirs) in enumerate(zip(logits, expected.logits, strict=True)):
            error = (mine - theirs).abs().max().item()
            assert error < TOLERANCE, f"{prompt}, step {step}: logits differ from the oracle by {error:.1e}"
        assert held == ranks(expected.held[0], inputs), prompt
        for layer, evicting in cache.evicting.items():
            left = later(held[layer], evicting, inputs, steps)
            assert left == ranks(expected.held[-1], inputs)[layer], f"{prompt}, layer {layer}"
    return optimized


@torch.inference_mode()
def stepwise(optimized: Any, inputs: Any, tokens: Tensor) -> tuple[list[Tensor], kv.Held, VisualTextCache]:
    """Logits behind the prompt and each token, what was held behind the prompt, and the cache."""
    out = optimized(**inputs)
    logits, cache = [out.logits[:, 0]], out.past_key_values
    for token in tokens.unbind(1):
        logits.append(optimized(input_ids=token[:, None], past_key_values=cache).logits[:, 0])
    return logits, numbered(out.held, inputs), cache


def later(held: list[list[list[int]]], cache: HeavyRecentCache, inputs: Any, steps: int) -> list[list[list[int]]]:
    """What a layer's cache holds after so many steps, as numbers among a row's real tokens; held: before them."""
    numbers = cache.numbers.view()
    found: list[list[list[int]]] = []
    for b, row in enumerate(held):
        names = [[*head, *(int(inputs["attention_mask"][b].sum()) + step for step in range(steps))] for head in row]
        found.append([sorted(names[h][n] for n in numbers[b, h].tolist() if n != PAD) for h in range(len(row))])
    return found


def numbered(held: dict[int, Tensor], inputs: Any) -> kv.Held:
    """Places as numbers among a row's real tokens."""
    number = inputs["attention_mask"].cumsum(1) - 1
    return [
        [[sorted(number[b, p].item() for p in head[head != PAD]) for head in row] for b, row in enumerate(held[layer])]
        for layer in sorted(held)
    ]


def ranks(held: kv.Held, inputs: Any) -> kv.Held:
    """Places in the prompt padded on the left as numbers among a row's real tokens."""
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    return [[[[p - pads[b] for p in head] for head in row] for b, row in enumerate(layer)] for layer in held]


SNAPS = (
    {"capacity": 14, "window": 6},
    {"capacity": 12, "window": 11, "kernel": 3, "pooling": "max"},
    {"capacity": 0.5, "window": 4, "kernel": 1},
    {"capacity": 0.1, "window": 5, "pooling": "max"},
    {"capacity": 30, "window": 1},
)


def snap(options: dict[str, Any]) -> Any:
    return lambda: kv.SnapKV(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", SNAPS, ids=str)
def test_snapkv(model: Any, options: dict[str, Any]) -> None:
    check(model, [SnapKV(**options)], snap(options))


def test_snapkv_holds_what_eager_attention_matrices_say(gqa: Any) -> None:
    inputs = random_inputs(gqa, seed=3, text_tokens=20)
    before = gqa.config._attn_implementation
    gqa.set_attn_implementation("eager")
    with torch.inference_mode():
        matrices = gqa(**inputs, output_attentions=True).attentions
        held = optimize(gqa, [SnapKV(14, 6)])(**inputs).held
    gqa.set_attn_implementation(before)
    length = inputs["input_ids"].shape[1]
    for layer, matrix in enumerate(matrices):
        for head, rows in enumerate(matrix[0].unflatten(0, (2, -1)).sum(1)):
            assert held[layer][0, head].tolist() == kv.SnapKV(14, 6).start(list(range(length)), rows)


def test_a_prompt_within_the_capacity_is_kept_whole(gqa: Any) -> None:
    inputs = random_inputs(gqa, batch=2)
    tokens = torch.tensor([[5, 6, 7]] * 2)
    dense = optimize(gqa, [])
    for passes in ("snapkv", "snapkv{capacity=40,window=28}"):
        optimized = optimize(gqa, passes)
        with torch.inference_mode():
            a, b = dense(**inputs), optimized(**inputs)
            assert torch.equal(a.logits, b.logits)
            for token in tokens.unbind(1):
                pair = [
                    run(input_ids=token[:, None], past_key_values=out.past_key_values).logits
                    for run, out in ((dense, a), (optimized, b))
                ]
                torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


BUDGETS = ((0.5, 0.5), (5, 3), (0.2, 0.3), (0, 6), (0.3, 4), (100, 0.1))


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_heavy_recent(model: Any, budgets: tuple[float, float]) -> None:
    check(model, [HeavyRecent(*budgets)], lambda: kv.HeavyRecent(*budgets), prompts=PROMPTS[1:5])


@pytest.mark.slow
def test_heavy_recent_over_a_long_answer(gqa: Any) -> None:
    prompts = ({"batch": 2, "padding": "left", "images_per_row": [1, 0]},)
    check(gqa, [HeavyRecent()], lambda: kv.HeavyRecent(0.5, 0.5), prompts=prompts, steps=45)
    check(gqa, [HeavyRecent(6, 8)], lambda: kv.HeavyRecent(6, 8), prompts=prompts, steps=45)


ORACLES = {
    "snapkv": (SnapKV(12, 7), snap({"capacity": 12, "window": 7})),
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


@pytest.mark.parametrize(("heavy", "recent"), [(0.5, 0.5), (9, 7)])
def test_a_cache_is_bounded_however_long_the_answer_is(gqa: Any, heavy: float, recent: float) -> None:
    optimized = optimize(gqa, [CutVisual(3), HeavyRecent(heavy, recent)])
    inputs = random_inputs(gqa, batch=2, text_tokens=15)
    _, _, cache = stepwise(optimized, inputs, torch.full((2, 1), 5))
    token = torch.full((2, 1), 5)
    whole = [inputs["input_ids"].shape[1]] * 3 + [15]  # the last layer has text alone
    most = [16] * 4 if heavy == 9 else whole
    pointers = set()
    for _ in range(300):
        with torch.inference_mode():
            optimized(input_ids=token, past_key_values=cache)
        assert [cache.evicting[layer].k.buffer.shape[2] for layer in range(4)] == most
        pointers.add(tuple(part.buffer.data_ptr() for layer in cache.evicting.values() for part in layer.parts))
    assert cache.nbytes() == foveate.cost(optimized.program, text_tokens=15, batch=2, new_tokens=301).kv_bytes
    assert len(pointers) == 1, "steps write in place"
    assert not cache.text


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


def test_of_equal_sums_the_later_token_leaves() -> None:
    """And free slots are taken first, of each row its own budget."""
    numbers = torch.arange(4).expand(2, 1, 4)
    places = numbers.masked_fill(torch.tensor([[[False] * 4], [[False, False, False, True]]]), PAD)
    sums = torch.tensor([[[2.0, 1.0, 1.0, 9.0]], [[3.0, 1.0, 5.0, 0.0]]])
    k = torch.zeros(2, 1, 4, 2)
    cache = HeavyRecentCache(k, k, places, sums, torch.tensor([[3, 1], [3, 2]]))
    assert [part.buffer.shape[2] for part in cache.parts] == [5] * 4
    new, paid = torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 5)
    cache.step(new, new, paid)
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 4, 3, PAD], [0, 1, 2, 3, PAD]]
    cache.step(new, new, torch.cat([paid, paid[..., :1]], 2))
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 5, 3, PAD], [0, 1, 2, 3, 4]]
    cache.step(new, new, torch.cat([paid, paid[..., :1]], 2))
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 6, 3, PAD], [0, 1, 2, 5, 4]]
    assert cache.k.view()[0, 0, :, 0].tolist() == [0, 0, 1, 0, 0]


def test_steps_that_evict_are_not_captured(gqa: Any) -> None:
    optimized = optimize(gqa, [HeavyRecent()])
    with pytest.raises(InputError, match="captured"):
        optimized.capture_steps()


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


_MODELS: dict[tuple[int, int], Any] = {}


@st.composite
def cases(draw: Any) -> Any:
    shape = draw(st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]))
    if shape not in _MODELS:
        heads, kv_heads = shape
        _MODELS[shape] = random_llava(layers=2, hidden=heads * 8, heads=heads, kv_heads=kv_heads, ffn=48)
    counts = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    prompt = {
        "images_per_row": counts,
        "batch": len(counts),
        "padding": draw(st.sampled_from(["left", "right"])),
        "text_tokens": draw(st.integers(6, 20)),
        "prefix": draw(st.integers(0, 3)),
    }
    return _MODELS[shape], prompt


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    window=st.integers(1, 20),
    extra=st.integers(1, 20) | st.floats(0.05, 0.95),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["avg", "max"]),
)
def test_any_snapkv(case: Any, window: int, extra: float, kernel: int, pooling: str) -> None:
    capacity = extra if isinstance(extra, float) else window + extra
    options = {"capacity": capacity, "window": window, "kernel": kernel, "pooling": pooling}
    check(case[0], [SnapKV(**options)], snap(options), prompts=[case[1]], steps=2)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    heavy=st.integers(0, 20) | st.floats(0.05, 0.95),
    recent=st.integers(1, 20) | st.floats(0.05, 0.95),
)
def test_any_heavy_recent(case: Any, heavy: float, recent: float) -> None:
    check(case[0], [HeavyRecent(heavy, recent)], lambda: kv.HeavyRecent(heavy, recent), prompts=[case[1]], steps=6)
