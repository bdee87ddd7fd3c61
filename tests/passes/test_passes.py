"""Every pass, and combinations of passes, equal the masked oracle."""

import math

import pytest
import torch

from foveate.errors import FoveateWarning, PassError
from foveate.models.random import random_inputs, random_llava
from foveate.ops import PAD
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons, FastV, RandomPrune
from tests.oracle.masks import Masks, Prune
from tests.passes.check import check_pass, optimize
from tests.passes.conftest import FFN, HEADS, LAYERS


def heads(*kept_per_layer: set[int]) -> torch.Tensor:
    mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    for layer, kept in enumerate(kept_per_layer):
        mask[layer] = torch.tensor([h in kept for h in range(HEADS)])
    return mask


def neurons(kept: int, from_layer: int = 0) -> torch.Tensor:
    mask = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    mask[:, :kept] = True
    mask[:from_layer] = True
    return mask


ALL = set(range(HEADS))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_cut_visual(model, layer):
    check_pass(model, [CutVisual(layer)], Masks(cut_from=layer))


@pytest.mark.parametrize(("last", "layer"), [(1, 3), (4, 0), (0.5, 2)])
def test_the_last_layers_are_cut(mha, last, layer):
    check_pass(mha, [CutVisual(last=last)], Masks(cut_from=layer), [{}])


@pytest.mark.parametrize(
    "kept",
    [
        (ALL, ALL, {0, 1}, {2, 3}),  # whole groups when two query heads share a key head
        (ALL, ALL, {0, 2}, {1, 3}),  # one head of each group
        (ALL, {3}, {0, 1, 3}, {1, 2, 3}),  # uneven groups
        ({1}, ALL, set(), {0}),  # a layer without any head for visual tokens, and layer 0
    ],
    ids=["groups", "one-each", "uneven", "none-left"],
)
def test_drop_visual_heads_by_mask(model, kept):
    mask = heads(*kept)
    check_pass(model, [DropVisualHeads(mask=mask, from_layer=0)], Masks(heads=mask))


@pytest.mark.parametrize("kept", [(ALL, ALL, {0, 2}, {1, 2, 3}), ({1}, ALL, set(), {0})], ids=["some", "none-left"])
def test_drop_visual_heads_without_renormalising(gqa, kept):
    mask = heads(*kept)
    one = DropVisualHeads(mask=mask, from_layer=0, renorm=False)
    check_pass(
        gqa, [one], Masks(heads=mask, renorm=False), [{}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}]
    )
    with pytest.raises(AssertionError, match="differ from the oracle"):
        check_pass(gqa, [one], Masks(heads=mask), [{}])


def test_other_passes_after_heads_dropped_without_renormalising(mha):
    mask = heads(ALL, {0, 3}, {1, 2}, {1})
    passes = [DropVisualHeads(mask=mask, from_layer=0, renorm=False), FastV(2, 0.5), CutVisual(3)]
    check_pass(
        mha, passes, Masks(heads=mask, renorm=False, prunes=(Prune(2, 0.5, "fastv"),), cut_from=3), [{}, {"batch": 2}]
    )


@pytest.mark.slow
def test_drop_visual_heads_by_given_scores_keeps_the_best_and_the_lower_index_in_a_tie(model):
    scores = [[0.1, 0.4, 0.4, 0.2]] * LAYERS
    check_pass(model, [DropVisualHeads(keep=2, scores=scores)], Masks(heads=heads(ALL, ALL, {1, 2}, {1, 2})))
    check_pass(model, [DropVisualHeads(keep=1, scores=scores)], Masks(heads=heads(ALL, ALL, {1}, {1})))


def test_drop_visual_heads_by_weight_norm_follows_the_value_output_product(mha):
    size = mha.config.text_config.hidden_size // HEADS
    kept = []
    for layer in mha.model.language_model.layers:
        v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        norms = [(o[:, h * size : (h + 1) * size] @ v[h * size : (h + 1) * size]).norm() for h in range(HEADS)]
        kept.append(set(sorted(range(HEADS), key=lambda h, n=norms: -n[h])[:3]))
    mask = heads(*kept)
    check_pass(mha, [DropVisualHeads(keep=3, from_layer=0)], Masks(heads=mask))


def test_a_mask_does_not_reach_layers_before_from_layer(mha):
    mask = heads({0}, {0}, {0}, {0})
    expected = mask.clone()
    expected[:2] = True
    optimized = check_pass(mha, [DropVisualHeads(mask=mask)], Masks(heads=expected))
    assert any("whatever the mask says" in note for note in optimized.program.passes[0].notes)


@pytest.mark.parametrize("keep", [0.5, 0.25, 1 / FFN])
def test_drop_visual_neurons_prefix(model, keep):
    kept = math.floor(keep * FFN)
    check_pass(model, [DropVisualNeurons(keep)], Masks(neurons=neurons(kept)))


def test_drop_visual_neurons_from_a_layer_on(mha):
    check_pass(mha, [DropVisualNeurons(0.5, from_layer=2)], Masks(neurons=neurons(FFN // 2, 2)))


def test_drop_visual_neurons_rounds_up_to_a_multiple(mha):
    count = -(-math.floor(0.4 * FFN) // 16) * 16
    assert count != math.floor(0.4 * FFN), "there is something to round"
    check_pass(mha, [DropVisualNeurons(0.4, multiple_of=16)], Masks(neurons=neurons(count)))
    wide = random_llava(layers=2, ffn=4096)
    for options, expected in (
        ("", "4096 -> 1280 neurons (prefix, 1228 rounded up to a multiple of 64)"),
        (",multiple_of=1", "4096 -> 1228 neurons (prefix)"),
    ):
        opt = optimize(wide, f"drop-visual-neurons{{keep=0.3{options}}}")
        assert expected in " ".join(opt.program.passes[0].notes)


def test_drop_visual_neurons_by_magnitude_keeps_the_largest(mha):
    mask = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    for row, layer in zip(mask, mha.model.language_model.layers, strict=True):
        mlp = layer.mlp
        score = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        row[score.topk(FFN // 4).indices] = True
    check_pass(mha, [DropVisualNeurons(0.25, select="magnitude")], Masks(neurons=mask))


def test_drop_visual_neurons_at_random_keeps_that_many_and_depends_on_the_seed(mha):
    inputs = random_inputs(mha)
    logits = {}
    for seed in (0, 1, 0):
        optimized = optimize(mha, [DropVisualNeurons(0.5, select="random", seed=seed)])
        found = optimized(**inputs).logits
        assert seed not in logits or torch.equal(found, logits[seed])
        logits[seed] = found
        gates = [n for n in optimized.program.prefill.nodes if "up_proj" in n.meta["foveate"].role]
        assert {n.meta["val"].shape[-1] for n in gates if n.meta["foveate"].stream == "visual"} == {FFN // 2}
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize(("layer", "keep"), [(1, 0.5), (2, 0.25), (LAYERS - 1, 0.07), (2, 0.99)])
def test_fastv(model, layer, keep):
    check_pass(model, [FastV(layer, keep)], Masks(prunes=(Prune(layer, keep, "fastv"),)))


@pytest.mark.parametrize("layer", [0, 2])
def test_random_prune(model, layer):
    optimized = check_pass(model, [RandomPrune(layer, 0.4, seed=3)], Masks(prunes=(Prune(layer, 0.4, "given"),)))
    inputs = random_inputs(model, batch=2, images_per_row=[1, 2], padding="left")
    kept = optimized(**inputs).kept[layer]
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert (kept != PAD).sum(1).tolist() == [math.floor(0.4 * n) for n in visual.tolist()]


def test_random_prune_depends_on_its_seed_and_not_on_the_batch(mha):
    one = random_inputs(mha, seed=5)
    kept = {seed: optimize(mha, [RandomPrune(2, 0.5, seed)])(**one).kept[2] for seed in (0, 1)}
    assert not torch.equal(kept[0], kept[1])
    padded = random_inputs(mha, batch=2, images_per_row=[1, 2], padding="left")
    start = (padded["input_ids"][0] == mha.config.image_token_id).int().argmax()
    again = optimize(mha, [RandomPrune(2, 0.5, 0)])(**padded).kept[2][0]
    first = (one["input_ids"][0] == mha.config.image_token_id).int().argmax()
    assert torch.equal(again[again != PAD] - start, kept[0][0] - first)


COMBINATIONS = {
    "yopo": ("drop-visual-heads{keep=2,from_layer=0,scores=%s},drop-visual-neurons{keep=0.5},cut-visual{from_layer=2}"),
    "yopo-reversed": (
        "cut-visual{from_layer=2},drop-visual-neurons{keep=0.5},drop-visual-heads{keep=2,from_layer=0,scores=%s}"
    ),
    "fastv-first": "fastv{layer=1,keep=0.5},drop-visual-heads{keep=2,from_layer=0,scores=%s}",
    "fastv-last": "drop-visual-heads{keep=2,from_layer=0,scores=%s},fastv{layer=1,keep=0.5}",
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_passes_compose_in_any_legal_order(model, name):
    from foveate.passes import parse_pipeline

    scores = [[0.3, 0.1, 0.4, 0.2]] * LAYERS
    text = COMBINATIONS[name] % str(scores)
    mask = heads({0, 2}, {0, 2}, {0, 2}, {0, 2})
    yopo = "yopo" in name
    masks = Masks(
        cut_from=2 if yopo else None,
        heads=mask,
        neurons=neurons(FFN // 2) if yopo else None,
        prunes=() if yopo else (Prune(1, 0.5, "fastv"),),
    )
    check_pass(model, parse_pipeline(text), masks)


@pytest.mark.slow
def test_all_five_passes_at_once(model):
    mask = heads(ALL, {0, 3}, {1, 2}, ALL)
    passes = [
        RandomPrune(1, 0.8),
        FastV(2, 0.5),
        DropVisualHeads(mask=mask, from_layer=1),
        DropVisualNeurons(0.5, from_layer=1),
        CutVisual(3),
    ]
    masks = Masks(
        cut_from=3,
        heads=mask,
        neurons=neurons(FFN // 2, 1),
        prunes=(Prune(1, 0.8, "given"), Prune(2, 0.5, "fastv")),
    )
    check_pass(model, passes, masks)


def test_a_selection_before_an_earlier_one_narrows_both(mha):
    masks = Masks(prunes=(Prune(1, 0.5, "given"), Prune(3, 0.5, "fastv")))
    check_pass(mha, [FastV(3, 0.5), RandomPrune(1, 0.5)], masks)


@pytest.fixture(scope="module")
def biased():
    """A decoder with biases in attention and FFN, and a head size of its own."""
    from transformers import LlavaForConditionalGeneration

    from foveate.models.random import random_llava

    config = random_llava(layers=LAYERS, heads=HEADS, kv_heads=2, ffn=FFN).config
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    config.text_config.head_dim = 8
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith("bias") else 2 / parameter.shape[-1] ** 0.5
            torch.nn.init.normal_(parameter, std=scale) if "norm" not in name else None
        model.lm_head.weight.data[config.image_token_id] = 0
    return model


@pytest.mark.slow
def test_biases_and_a_head_size_of_its_own(biased):
    mask = heads(ALL, {0, 3}, set(), {1, 2})
    check_pass(biased, [DropVisualHeads(mask=mask, from_layer=0)], Masks(heads=mask))
    masks = Masks(neurons=neurons(FFN // 2), prunes=(Prune(2, 0.5, "fastv"),))
    check_pass(biased, [DropVisualNeurons(0.5, select="prefix"), FastV(2, 0.5)], masks)


REFUSED = {
    "cut-visual{from_layer=5}": "0 to 4",
    "cut-visual{from_layer=-1}": "0 or more",
    "cut-visual{from_layer=1.5}": "layer number",
    "cut-visual{from_layer=true}": "layer number",
    "cut-visual{from_layer=1,last=1}": "either from_layer or last",
    "cut-visual{last=-1}": "a number of layers, 0 or more",
    "cut-visual{last=5}": "the model has 4 layers",
    "drop-visual-heads": "give one of keep, alpha and mask",
    "drop-visual-heads{keep=5}": "4 heads",
    "drop-visual-heads{keep=-1}": "0 or more",
    "drop-visual-heads{keep=2,from_layer=9}": "0 to 3",
    "drop-visual-heads{mask=[[1,1]]}": "4 layers of 4 heads",
    "drop-visual-heads{mask=7}": "one row a layer",
    "drop-visual-heads{keep=2,scores=entropy}": "weight-norm",
    "drop-visual-neurons{keep=0}": "above 0",
    "drop-visual-neurons{keep=1.5}": "at most 1",
    "drop-visual-neurons{keep=0.001}": "at least 1",
    "drop-visual-neurons{select=best}": "prefix, random, magnitude, activity",
    "drop-visual-neurons{multiple_of=0}": "1 or more",
    "drop-visual-neurons{seed=-1}": "2**31",
    "fastv{layer=0}": "1 or more",
    "fastv{layer=4}": "1 to 3",
    "fastv{keep=0}": "above 0",
    "fastv{keep=half}": "above 0",
    "random-prune{layer=4}": "0 to 3",
    "cut-visual{from_layer=2},fastv{layer=2}": "cut at layer 2",
    "cut-visual{from_layer=2},random-prune{layer=3}": "cut at layer 2",
    "fastv{layer=3},cut-visual{from_layer=2}": "selected before layer 3",
    "fastv{layer=2},fastv{layer=2}": "already selected",
    "fastv{layer=2},random-prune{layer=2}": "already selected",
    "drop-visual-heads{keep=0,from_layer=0},fastv{layer=2}": "cut at layer 0",
    "drop-visual-heads{mask=[[1,1,1,1],[0,0,0,0],[1,1,1,1],[1,1,1,1]],from_layer=0},fastv{layer=2}": "no head of",
    "fastv{layer=2},drop-visual-heads{keep=0,from_layer=1}": "keep at least one head",
    "drop-visual-heads{keep=2},drop-visual-heads{keep=1}": "already has heads dropped",
    "drop-visual-neurons{keep=0.5},drop-visual-neurons{keep=0.25}": "already has part",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_makes_no_sense_is_refused_with_what_is_allowed(mha, text):
    with pytest.raises(PassError) as error:
        optimize(mha, text)
    assert REFUSED[text] in str(error.value)
    assert "\n" not in str(error.value)


SKIPPED = {
    f"cut-visual{{from_layer={LAYERS}}}": "no layer from 4",
    "drop-visual-heads{keep=4}": "no visible layer",
    "drop-visual-neurons{keep=1}": "every neuron",
    "fastv{keep=1}": "every visual token",
    "random-prune{keep=1.0}": "every visual token",
    "cut-visual{from_layer=1},cut-visual{from_layer=2}": "first blind one is 1",
    "cut-visual{from_layer=0},drop-visual-heads{keep=2}": "no visible layer",
    "cut-visual{from_layer=0},drop-visual-neurons{keep=0.5}": "no layer",
}


@pytest.mark.parametrize("text", SKIPPED)
def test_a_pass_that_changes_nothing_says_why_and_changes_nothing(mha, text):
    from foveate.ir.split import structure

    with pytest.warns(FoveateWarning, match="changed nothing"):
        optimized = optimize(mha, text)
    record = optimized.program.passes[-1]
    assert record.skipped is not None and SKIPPED[text] in record.skipped
    before, _, _ = text.rpartition("},")
    base = optimize(mha, before + "}" if before else None)
    assert structure(base.program.prefill) == structure(optimized.program.prefill)


def test_passes_that_keep_everything_leave_the_logits_alone(mha):
    inputs = random_inputs(mha)
    with pytest.warns(FoveateWarning):
        optimized = optimize(mha, f"fastv{{keep=1}},drop-visual-neurons{{keep=1}},cut-visual{{from_layer={LAYERS}}}")
    assert torch.allclose(optimized(**inputs).logits, mha(**inputs).logits[:, -1:], atol=1e-4)
