"""Loss and gradients of an optimized model equal those of the masked oracle, and without passes transformers' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.models.random import random_inputs
from foveate.models.recording import first_names
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons, FastV, NeighborAttention, RandomPrune
from tests.oracle.masked import masked_forward, masked_loss
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import TOLERANCE, _kept_mask, optimize
from tests.passes.conftest import HEADS, LAYERS
from tests.passes.test_passes import heads, neurons

PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 2, "prefix": 0},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left", "text_tokens": 14},
    {"batch": 3, "padding": "right"},
    {"batch": 2, "images": 0},
)

ALL = set(range(HEADS))
CASES: dict[str, tuple[list[Any], Masks]] = {
    "nothing": ([], Masks()),
    "cut-visual": ([CutVisual(1)], Masks(cut_from=1)),
    "cut-visual at the last layer": ([CutVisual(LAYERS - 1)], Masks(cut_from=LAYERS - 1)),
    "drop-visual-heads": (
        [DropVisualHeads(mask=heads(ALL, {3}, {0, 1, 3}, {1, 2}), from_layer=0)],
        Masks(heads=heads(ALL, {3}, {0, 1, 3}, {1, 2})),
    ),
    "drop-visual-neurons": ([DropVisualNeurons(0.5)], Masks(neurons=neurons(48))),
    "fastv": ([FastV(1, 0.5)], Masks(prunes=(Prune(1, 0.5, "fastv"),))),
    "fastv before the last layer": ([FastV(LAYERS - 1, 0.3)], Masks(prunes=(Prune(LAYERS - 1, 0.3, "fastv"),))),
    "random-prune": ([RandomPrune(2, 0.4)], Masks(prunes=(Prune(2, 0.4, "given"),))),
    "neighbor-attention": ([NeighborAttention(1)], Masks(neighbors=Neighbors((4, 4), 1))),
    "neighbor-attention after fastv": (
        [FastV(1, 0.5), NeighborAttention(1, causal=True)],
        Masks(prunes=(Prune(1, 0.5, "fastv"),), neighbors=Neighbors((4, 4), 1, causal=True)),
    ),
    "all five": (
        [
            RandomPrune(1, 0.8),
            FastV(2, 0.5),
            DropVisualHeads(mask=heads(ALL, {0, 3}, {1, 2}, ALL), from_layer=1),
            DropVisualNeurons(0.5, from_layer=1),
            CutVisual(3),
        ],
        Masks(
            cut_from=3,
            heads=heads(ALL, {0, 3}, {1, 2}, ALL),
            neurons=neurons(48, 1),
            prunes=(Prune(1, 0.8, "given"), Prune(2, 0.5, "fastv")),
        ),
    ),
}


def answered(inputs: dict[str, Tensor]) -> Tensor:
    """Labels on the last one to three tokens of each row, which stand for an answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, attended in enumerate(inputs["attention_mask"]):
        places = attended.nonzero().squeeze(1)[-1 - row % 3 :]
        labels[row, places] = inputs["input_ids"][row, places]
    return labels


def choices_of_prompts(model: Any, inputs: dict[str, Tensor], labels: Tensor, masks: Masks) -> tuple[Tensor, ...]:
    """What the oracle keeps when it sees each row up to its answer and nothing else: bool [B, S] a prune."""
    kept = [torch.zeros_like(labels, dtype=torch.bool) for _ in masks.prunes]
    per_image = model.config.image_seq_length
    first_image = 0
    for row, ids in enumerate(inputs["input_ids"]):
        places = inputs["attention_mask"][row].nonzero().squeeze(1)
        places = places[places < (labels[row] != -100).int().argmax()]
        count = int((ids == model.config.image_token_id).sum()) // per_image
        alone: dict[str, Tensor] = {"input_ids": ids[places][None]}
        if count:
            alone["pixel_values"] = inputs["pixel_values"][first_image : first_image + count]
        first_image += count
        given = tuple(p if p.given is None else replace(p, given=p.given[row, places][None]) for p in masks.prunes)
        for number, mask in enumerate(masked_forward(model, alone, replace(masks, prunes=given)).kept):
            kept[number][row, places] = mask[0]
    return tuple(kept)


def in_order_of(original: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a weight that a pass may have reordered, in the original's order."""
    if torch.equal(original, weight):
        return gradient
    for dim in range(original.dim()):
        places = torch.cdist(weight.movedim(dim, 0).flatten(1), original.movedim(dim, 0).flatten(1)).argmin(1)
        if torch.equal(original.index_select(dim, places), weight):
            return torch.zeros_like(gradient).index_copy(dim, places, gradient)
    raise AssertionError("the weight is no reordering of the original")


def check(model: Any, optimized: Any, masks: Masks, prompt: dict[str, Any]) -> None:
    inputs = random_inputs(model, seed=3, **prompt)
    labels = answered(inputs)
    out = optimized(**inputs, labels=labels)
    for number, prune in enumerate(masks.prunes):
        if prune.choose == "given":
            given = _kept_mask(out.kept[prune.layer], inputs["input_ids"])
            masks = replace(masks, prunes=tuple(replace(p, given=given) if p is prune else p for p in masks.prunes))
        else:
            chosen = choices_of_prompts(model, inputs, labels, masks)[number]
            assert torch.equal(_kept_mask(out.kept[prune.layer], inputs["input_ids"]), chosen), prompt
            held = replace(prune, choose="given", given=chosen)
            masks = replace(masks, prunes=tuple(held if p is prune else p for p in masks.prunes))
    expected = masked_loss(model, inputs, labels, masks)
    assert abs(out.loss.item() - expected.item()) < TOLERANCE, prompt
    first = first_names(model)
    originals = {first[name]: value for name, value in model.named_parameters()}
    weights = {name: value for name, value in optimized.weights.items() if value.requires_grad}
    wanted = torch.autograd.grad(expected, list(originals.values()), allow_unused=True)
    found = torch.autograd.grad(out.loss, list(weights.values()), allow_unused=True)
    expected_gradients = dict(zip(originals, wanted, strict=True))
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        theirs = expected_gradients.pop(name)
        if gradient is None or theirs is None:
            assert all(g is None or not g.any() for g in (gradient, theirs)), f"{prompt}: {name}"
            continue
        error = (in_order_of(originals[name], weight, gradient) - theirs).abs().max().item()
        assert error < TOLERANCE, f"{prompt}: the gradient of {name} differs by {error:.1e}"
    assert not any(g is not None and g.any() for g in expected_gradients.values()), "a weight was forgotten"


# (key heads, case): heads depend on how many share a key.
SHARED = [*((2, case) for case in CASES), (4, "drop-visual-heads"), (1, "drop-visual-heads")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "case"), SHARED, indirect=["model"])
def test_loss_and_gradients_equal_the_masked_oracle(model: Any, case: str) -> None:
    passes, masks = CASES[case]
    optimized = optimize(model, passes)
    for prompt in PROMPTS:
        check(model, optimized, masks, prompt)


def test_a_model_that_was_asked_in_inference_mode_can_be_trained(mha: Any) -> None:
    optimized = optimize(mha, "neighbor-attention{radius=1}")
    inputs = random_inputs(mha, batch=1, text_tokens=23, seed=5)  # a size that no other test asks for
    with torch.inference_mode():
        asked = optimized(**inputs).logits
    optimized(**inputs, labels=answered(inputs)).loss.backward()
    with torch.inference_mode():
        assert torch.equal(optimized(**inputs).logits, asked)


def test_neurons_that_were_reordered_learn_as_the_original_ones(mha: Any) -> None:
    mask = torch.zeros(LAYERS, 96, dtype=torch.bool)
    for row, layer in zip(mask, mha.model.language_model.layers, strict=True):
        mlp = layer.mlp
        score = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        row[score.topk(24).indices] = True
    check(mha, optimize(mha, [DropVisualNeurons(0.25, select="magnitude")]), Masks(neurons=mask), {"batch": 2})


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_without_passes_loss_equals_transformers_with_labels_everywhere(mha: Any, prompt: dict[str, Any]) -> None:
    inputs = random_inputs(mha, seed=4, **prompt)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == mha.config.image_token_id), -100)
    # Here transformers would predict a row's first token from padding.
    first = inputs["attention_mask"].argmax(1)
    labels[torch.arange(len(labels)), first] = -100
    optimized = optimize(mha, None)
    for items in (None, 7):
        theirs = mha(**inputs, labels=labels, num_items_in_batch=items).loss
        ours = optimized(**inputs, labels=labels, num_items_in_batch=items).loss
        assert abs(ours.item() - theirs.item()) < TOLERANCE * (1 if items is None else 10)
