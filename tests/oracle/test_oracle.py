"""The oracle proven: against transformers itself, run on less or with one part switched off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from foveate.models.random import random_inputs
from tests.oracle.conftest import FFN, HEADS, LAYERS, assert_near, dense, random_mask, small, visual
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Prune

PROMPTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"images": 0},
    "three images": {"images": 3},
    "left": {"batch": 3, "padding": "left"},
    "right": {"batch": 3, "padding": "right"},
    "ragged left": {"images_per_row": [2, 0, 1, 3], "padding": "left"},
    "ragged right": {"images_per_row": [2, 0, 1, 3], "padding": "right"},
}
prompts = pytest.mark.parametrize("prompt", PROMPTS)


# --- nothing hidden ---------------------------------------------------------------------------------


@prompts
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_no_masks_is_the_model(prompt: str, kv_heads: int) -> None:
    model = small(kv_heads=kv_heads)
    inputs = random_inputs(model, **PROMPTS[prompt])
    output = masked_forward(model, inputs)
    assert_near(output.logits, dense(model, inputs))
    assert output.logits.dtype == torch.float32
    assert output.kept == ()


@prompts
def test_masks_that_keep_everything_change_nothing(model: Any, prompt: str) -> None:
    inputs = random_inputs(model, **PROMPTS[prompt])
    masks = Masks(
        cut_from=LAYERS,
        heads=torch.ones(LAYERS, HEADS, dtype=torch.bool),
        neurons=torch.ones(LAYERS, FFN, dtype=torch.bool),
        prunes=(Prune(1, 1.0, "fastv"), Prune(2, 1.0, "given", visual(model, inputs))),
    )
    output = masked_forward(model, inputs, masks)
    assert_near(output.logits, dense(model, inputs))
    assert all(torch.equal(kept, visual(model, inputs)) for kept in output.kept)


def test_half_precision() -> None:
    half = small(kv_heads=2, dtype=torch.bfloat16)
    inputs = random_inputs(half, batch=2, padding="left")
    output = masked_forward(half, inputs, Masks(heads=torch.ones(LAYERS, HEADS, dtype=torch.bool)))
    assert output.logits.dtype == torch.float32
    assert_near(output.logits, dense(half, inputs).float(), rtol=0.1, atol=0.15)


# --- transformers run on less, or with one part switched off ----------------------------------------


@prompts
def test_cut_from_the_first_layer_is_the_model_without_the_visual_tokens(model: Any, prompt: str) -> None:
    inputs = random_inputs(model, **PROMPTS[prompt])
    cut = masked_forward(model, inputs, Masks(cut_from=0)).logits
    for row, ids in enumerate(inputs["input_ids"]):
        text = inputs["attention_mask"][row].bool() & ~visual(model, inputs)[row]
        places = (inputs["attention_mask"][row].cumsum(0) - 1)[text]
        with torch.no_grad():
            # Without a mask, transformers would take the gap in the positions for two packed rows.
            shown = torch.ones_like(places)[None]
            alone = model(input_ids=ids[text][None], attention_mask=shown, position_ids=places[None]).logits
        assert_near(cut[row], alone[0, -1])


def test_cut_hides_the_image_and_later_cuts_show_it(model: Any) -> None:
    inputs = random_inputs(model)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    outputs = [
        [masked_forward(model, i, Masks(cut_from=cut)).logits for i in (inputs, other)] for cut in range(LAYERS + 1)
    ]
    assert_near(outputs[0][0], outputs[0][1], rtol=0, atol=0)
    assert all((ours - theirs).abs().max() > 1e-2 for ours, theirs in outputs[1:])


@prompts
def test_no_head_for_visual_tokens_hides_the_image(model: Any, prompt: str) -> None:
    inputs = random_inputs(model, **PROMPTS[prompt])
    no_heads = Masks(heads=torch.zeros(LAYERS, HEADS, dtype=torch.bool))
    cut = masked_forward(model, inputs, Masks(cut_from=0))
    assert_near(masked_forward(model, inputs, no_heads).logits, cut.logits)


def test_no_neuron_for_visual_tokens_is_no_ffn_on_their_rows(model: Any) -> None:
    inputs = random_inputs(model, images_per_row=[2, 1], padding="left")
    rows = visual(model, inputs)[:, :, None]
    layers = model.model.language_model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda _module, _args, output: output.masked_fill(rows, 0)) for layer in layers
    ]
    expected = dense(model, inputs)
    for hook in hooks:
        hook.remove()
    output = masked_forward(model, inputs, Masks(neurons=torch.zeros(LAYERS, FFN, dtype=torch.bool)))
    assert_near(output.logits, expected)
    assert (output.logits - dense(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("prompt", ["plain", "ragged left", "ragged right"])
def test_pruning_all_is_a_cut(model: Any, prompt: str, layer: int) -> None:
    inputs = random_inputs(model, **PROMPTS[prompt])
    pruned = masked_forward(model, inputs, Masks(prunes=(Prune(layer, 0.0, "fastv"),)))
    cut = masked_forward(model, inputs, Masks(cut_from=layer))
    assert_near(pruned.logits, cut.logits)
    assert not pruned.kept[0].any()


@pytest.mark.parametrize("prompt", ["three images", "ragged left", "ragged right"])
def test_fastv_keeps_what_the_eager_attention_says(prompt: str) -> None:
    model = small(kv_heads=2)
    model.set_attn_implementation("eager")
    inputs = random_inputs(model, **PROMPTS[prompt])
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for layer in (1, 2):
        kept = masked_forward(model, inputs, Masks(prunes=(Prune(layer, 0.4, "fastv"),))).kept[0]
        for row, places in enumerate(visual(model, inputs)):
            last = int(inputs["attention_mask"][row].nonzero().max())
            mass = attentions[layer - 1][row, :, last].mean(0)[places]
            best = mass.topk(math.floor(0.4 * len(mass))).indices.sort().values
            assert kept[row].nonzero().squeeze(1).tolist() == places.nonzero().squeeze(1)[best].tolist()


# --- choices ----------------------------------------------------------------------------------------


def test_counts_are_floors_of_what_is_alive_in_each_row(model: Any) -> None:
    inputs = random_inputs(model, images_per_row=[3, 0, 1, 2], padding="right")
    prunes = (Prune(1, 0.7, "fastv"), Prune(2, 0.5, "fastv"))
    first, second = masked_forward(model, inputs, Masks(prunes=prunes)).kept
    assert first.sum(1).tolist() == [8, 0, 2, 5]  # of 12, 0, 4, 8
    assert second.sum(1).tolist() == [4, 0, 1, 2]
    assert not (second & ~first).any()
    assert not (first & ~visual(model, inputs)).any()


def test_given_scores_follow_the_tokens_and_ties_go_first(model: Any) -> None:
    inputs = random_inputs(model, images_per_row=[2, 0, 1], padding="left")
    scores = torch.tensor([[0, 3, 1, 3, 3, -1, 3, 3], [9] * 8, [-5, -5, -7, -5, 9, 9, 9, 9]]).float()
    (kept,) = masked_forward(model, inputs, Masks(prunes=(Prune(0, 0.5, "given", scores),))).kept
    rows = zip(kept, visual(model, inputs), strict=True)
    picked = [row[places].nonzero().squeeze(1).tolist() for row, places in rows]
    assert picked == [[1, 3, 4, 6], [], [0, 1]]


def test_equal_attention_keeps_the_first_tokens(model: Any) -> None:
    inputs = random_inputs(model, images=2)
    masks = Masks(cut_from=0, prunes=(Prune(1, 0.5, "fastv"),))  # after the cut all scores are 0
    (kept,) = masked_forward(model, inputs, masks).kept
    assert kept[0].nonzero().squeeze(1).tolist() == visual(model, inputs)[0].nonzero().squeeze(1)[:4].tolist()


def test_given_mask_equals_the_choice_it_was_taken_from(model: Any) -> None:
    inputs = random_inputs(model, images_per_row=[2, 1], padding="right")
    chosen = masked_forward(model, inputs, Masks(prunes=(Prune(1, 0.5, "fastv"),)))
    given = masked_forward(model, inputs, Masks(prunes=(Prune(1, 0.0, "given", chosen.kept[0]),)))
    assert_near(given.logits, chosen.logits, rtol=0, atol=0)
    later = (Prune(1, 0.5, "fastv"), Prune(2, 0.0, "given", visual(model, inputs)))
    assert torch.equal(masked_forward(model, inputs, Masks(prunes=later)).kept[1], chosen.kept[0])
    opposite = visual(model, inputs) & ~chosen.kept[0]
    other = masked_forward(model, inputs, Masks(prunes=(Prune(1, 0.0, "given", opposite),)))
    assert (other.logits - chosen.logits).abs().max() > 1e-3


# --- generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["plain", "text", "left", "ragged left"])
def test_greedy_is_generate(model: Any, prompt: str) -> None:
    inputs = random_inputs(model, **PROMPTS[prompt])
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
    assert torch.equal(masked_greedy(model, inputs, Masks(), 5), expected)


def test_greedy_of_right_padded_rows_is_that_of_the_rows_alone(model: Any) -> None:
    inputs = random_inputs(model, images_per_row=[2, 0, 1], padding="right")
    masks = Masks(cut_from=2, prunes=(Prune(0, 0.0, "given", random_mask(*inputs["input_ids"].shape)),))
    together = masked_greedy(model, inputs, masks, 4)
    images = torch.split(inputs["pixel_values"], [2, 0, 1])
    for row, pixels in enumerate(images):
        real = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row][real][None]}
        if len(pixels):
            alone["pixel_values"] = pixels
        given = masks.prunes[0].given
        assert given is not None
        own = Masks(cut_from=2, prunes=(Prune(0, 0.0, "given", given[row][real][None]),))
        assert torch.equal(masked_greedy(model, alone, own, 4)[0], together[row])


@pytest.mark.parametrize("hold", [True, False])
def test_greedy_holds_or_renews_the_choices(model: Any, hold: bool) -> None:
    inputs = random_inputs(model, images=2, seed=2)  # one where holding and renewing part ways
    prune = Prune(1, 0.25, "fastv")
    (held,) = masked_forward(model, inputs, Masks(prunes=(prune,))).kept
    tokens, longer = [], inputs
    for _ in range(6):
        masks = Masks(prunes=(Prune(1, 0.25, "given", held) if hold else prune,))
        output = masked_forward(model, longer, masks)
        tokens.append(output.logits.argmax(-1))
        ids = torch.cat([longer["input_ids"], tokens[-1][:, None]], 1)
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        held = torch.cat([held, torch.zeros(1, 1, dtype=torch.bool)], 1)
    result = masked_greedy(model, inputs, Masks(prunes=(prune,)), 6, hold_choices=hold)
    assert torch.equal(result, torch.stack(tokens, 1))
    other = masked_greedy(model, inputs, Masks(prunes=(prune,)), 6, hold_choices=not hold)
    assert not torch.equal(result, other)


# --- the model afterwards, and wrong use ------------------------------------------------------------


def state(model: Any) -> tuple[Any, ...]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return hooks, attributes, implementations, model.config.to_dict(), model.training


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(implementation: str) -> None:
    model = small()
    model.set_attn_implementation(implementation)
    inputs = random_inputs(model, images_per_row=[2, 1], padding="left")
    logits = dense(model, inputs)  # first: transformers hooks its vision tower on the first call
    before = state(model)
    masks = Masks(1, random_mask(LAYERS, HEADS), random_mask(LAYERS, FFN), (Prune(1, 0.5, "fastv"),))
    assert (masked_forward(model, inputs, masks).logits - logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        masked_forward(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]}, masks)
    assert state(model) == before
    assert torch.equal(dense(model, inputs), logits)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (Masks(cut_from=LAYERS + 1), "cut_from"),
        (Masks(heads=torch.ones(LAYERS, HEADS)), "heads must be bool"),
        (Masks(heads=torch.ones(LAYERS, HEADS + 1).bool()), "heads must be bool"),
        (Masks(neurons=torch.ones(LAYERS - 1, FFN).bool()), "neurons must be bool"),
        (Masks(prunes=(Prune(0, 0.5, "fastv"),)), "fastv prunes before"),
        (Masks(prunes=(Prune(LAYERS, 0.5, "fastv"),)), "fastv prunes before"),
        (Masks(prunes=(Prune(1, 1.5, "fastv"),)), "keep"),
        (Masks(prunes=(Prune(1, 0.5, "given"),)), "`given` goes with"),
        (Masks(prunes=(Prune(1, 0.5, "given", torch.zeros(1, 3)),)), "must have the shape"),
        (Masks(prunes=(Prune(2, 0.5, "fastv"), Prune(1, 0.5, "fastv"))), "order of their layers"),
    ],
)
def test_wrong_masks_are_refused(model: Any, masks: Masks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_forward(model, random_inputs(model), masks)


def test_a_row_may_end_with_an_image_only_if_nothing_is_removed(model: Any) -> None:
    inputs = random_inputs(model)
    end = int(visual(model, inputs)[0].nonzero().max()) + 1
    ids, mask = inputs["input_ids"][:, :end], inputs["attention_mask"][:, :end]
    short = {**inputs, "input_ids": ids, "attention_mask": mask}
    assert_near(masked_forward(model, short).logits, dense(model, short))
    with pytest.raises(ValueError, match="ends with a visual token"):
        masked_forward(model, short, Masks(cut_from=1))


def test_position_ids_are_read_and_count(model: Any) -> None:
    inputs = random_inputs(model)
    places = torch.arange(inputs["input_ids"].shape[1])[None] * 3
    with torch.no_grad():
        expected = model(**inputs, position_ids=places).logits[:, -1]
    output = masked_forward(model, {**inputs, "position_ids": places})
    assert_near(output.logits, expected)
    assert (output.logits - dense(model, inputs)).abs().max() > 1e-2
