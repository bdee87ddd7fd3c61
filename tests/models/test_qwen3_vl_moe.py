"""Qwen3-VL with experts: one op a layer chooses as transformers does; `test_running` has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import foveate
from foveate import ops
from foveate.errors import BackendError, PassError, TraceError, UnsupportedModelError
from foveate.ir.program import info
from foveate.ir.tokens import token_axes
from foveate.models.registry import trace_program
from tests.models import tiny
from tests.models.prompts import made
from tests.models.test_running import check, optimized, source, traced
from tests.oracle.masks import Masks, Neighbors, Prune

NAME = "qwen3-vl-moe"
TOKENS = "neighbor-attention{radius=1},fastv{layer=1,keep=0.5},cut-visual{from_layer=2}"


def mixtures(graph: Any) -> list[Any]:
    return [n for n in graph.nodes if n.target == ops.experts]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
def test_passes_together_are_their_masked_oracle(padding: str) -> None:
    masks = Masks(2, None, None, (Prune(1, 0.5, "fastv"),), Neighbors((1, 1), 1))
    check(NAME, optimized(NAME, TOKENS), masks, padding)


def test_layers_have_experts_where_the_configuration_says() -> None:
    program = traced(NAME)
    found = [(info(n).layer, info(n).stream) for n in mixtures(program.prefill)]
    assert found == [(0, "visual"), (0, "text"), (2, "text")]  # of the last layer one token is all that is needed
    assert [info(n).layer for n in mixtures(program.graphs["decode"])] == [0, 2]
    assert program.info.intermediate_size == 2 * tiny.FFN // 2


def test_layers_of_experts_are_recorded_once_and_the_model_is_as_it_was() -> None:
    model = tiny.qwen3_vl_moe(text={"mlp_only_layers": []})
    block = type(model.model.language_model.layers[0].mlp)
    before = block.forward
    assert trace_program(model).to_text()
    assert block.forward is before
    assert trace_program(tiny.qwen3_vl_moe("meta", {"mlp_only_layers": []})).to_text() == trace_program(model).to_text()


def test_neurons_of_experts_stay() -> None:
    with pytest.raises(PassError, match="drop-visual-neurons: in layer 0 each token chooses its experts"):
        optimized(NAME, "drop-visual-neurons{keep=0.5}")
    with pytest.raises(UnsupportedModelError, match="hidden_act 'relu' is not supported in experts; silu, gelu"):
        trace_program(tiny.qwen3_vl_moe("meta", {"hidden_act": "relu"}))


def test_tokens_and_their_choices_must_stand_on_one_axis() -> None:
    graph = torch.fx.Graph()
    x, logits = graph.placeholder("x"), graph.placeholder("logits")
    weights = [graph.placeholder(name) for name in ("gate_up", "down")]
    node = graph.call_function(ops.experts, (x, logits, *weights, 1, "silu"))
    sizes = ((2, 5, 6), (2, 5, 3), (3, 8, 6), (3, 6, 4))
    for each, size in zip((x, logits, *weights), sizes, strict=True):
        each.meta["val"] = torch.empty(size)
        each.meta["foveate"] = info(mixtures(traced(NAME).prefill)[0])
    node.meta = {"val": torch.empty(2, 5, 6), "foveate": x.meta["foveate"]}
    assert token_axes(graph, {"x": 1, "logits": 1})[node] == 1
    with pytest.raises(TraceError, match=r"layer 0, mlp, node experts_default: foveate.experts.default mixes tokens"):
        token_axes(graph, {"x": 1, "logits": 0})


def test_a_step_reads_the_experts_that_its_token_may_choose() -> None:
    program = traced(NAME)
    one, many = (foveate.cost(program, batch=n, text_tokens=8).decode for n in (1, 1000))
    read = [n.args[place].target for n in mixtures(program.graphs["decode"]) for place in (2, 3)]
    weights = sum(program.weights.get(name).nbytes for name in read)
    assert many.weight_bytes - one.weight_bytes == pytest.approx(weights * (1 - 2 / 5), rel=0.01)


def test_a_saved_folder_an_artifact_and_a_package(tmp_path: Path) -> None:
    source(NAME).save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    mine = foveate.optimize(again, TOKENS)
    inputs = made(source(NAME), 1, [[1, 0], [0, 1]]).inputs
    expected = mine.generate(**inputs, max_new_tokens=6, do_sample=False)
    mine.save_pretrained(tmp_path / "saved")
    assert torch.equal(foveate.load(tmp_path / "saved").generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    package = foveate.export(mine, output=tmp_path / "package")
    assert package.parity is not None and package.parity.ok and package.parity.kept
    there = foveate.load(tmp_path / "package")
    assert torch.equal(there.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_tensorrt_does_not_take_the_loop_over_experts(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"TensorRT does not take what is exported: decoder_prefill: Unique .*NonZero"
    ):
        foveate.export(optimized(NAME, ""), backend="tensorrt", output=tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_experts_learn_with_the_rest() -> None:
    mine = foveate.optimize(tiny.qwen3_vl_moe(), TOKENS).train()
    inputs = made(source(NAME), 1, [[1, 0]]).inputs
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    mine(**inputs, labels=labels).loss.backward()
    named = dict(mine.named_parameters())
    for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        (found,) = (p.grad for n, p in named.items() if f"layers.0.mlp.{part}".replace(".", "/") in n.replace(".", "/"))
        assert found is not None and bool(found.isfinite().all()) and float(found.abs().sum()) > 0, part


@pytest.mark.slow
def test_bf16_answers_as_fp32_does_but_for_rounding() -> None:
    whole, half = source(NAME), tiny.qwen3_vl_moe().to(torch.bfloat16)
    inputs = made(whole, 2, [[1, 0]]).inputs
    short = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        expected, found = optimized(NAME, "")(**inputs).logits, foveate.optimize(half, "")(**short).logits
    assert float((found.float() - expected).abs().max()) < 0.1 * float(expected.abs().max())
