"""Packages in half precision: scores stay in fp32, and what is exported computes what eager torch computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, shape_inference
from onnx.reference import ReferenceEvaluator

import foveate
from foveate import package
from foveate.backends.base import joined_graph, lower
from foveate.backends.onnx.checking import in_fp32
from foveate.backends.onnx.emit import ELEMENT, Place
from foveate.backends.onnx.graphs import build
from foveate.backends.onnx.lowering import Seen, recorded
from foveate.backends.onnx.names import FILES
from foveate.errors import BackendError, ParityError
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from foveate.package import Parity

HALVES = (torch.float16, torch.bfloat16)
PASSES = (
    "fastv{layer=1,keep=0.5}",
    "fastervlm{keep=0.5},neighbor-attention{radius=1},drop-visual-heads{keep=2,from_layer=1}",
    "dart{layer=1,keep=0.5}",
    "sparsevlm{layers=[0],keeps=[0.5]}",
    "visionzip{dominant=5,contextual=3}",
    "prumerge{}",
    "divprune{keep=0.5}",
    "tome{}",
    "cls-curve{layer=1}",
    "snapkv{capacity=8,window=4}",
    "heavy-recent{heavy=4,recent=4}",
)
SCORES = {"TopK", "Softmax", "ArgMax", "ArgMin", "CumSum"}


@functools.cache
def source(dtype: torch.dtype) -> Any:
    return random_llava(layers=2, kv_heads=2, dtype=dtype)


@functools.cache
def traced(dtype: torch.dtype) -> Any:
    return foveate.trace(source(dtype))


def optimized(passes: str, dtype: torch.dtype) -> OptimizedModel:
    return foveate.optimize(source(dtype), passes, traced=traced(dtype))


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for found in node.attribute:
            if found.HasField("g"):
                yield from nodes(found.g)


@pytest.mark.parametrize("opset", [22, 23])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_scores_are_in_fp32(passes: str, dtype: torch.dtype, opset: int) -> None:
    program, ranked = optimized(passes, dtype).program, 0
    places = {key: Place(0, value.numel() * value.element_size()) for key, value in program.weights.items()}
    for name, graph in program.graphs.items():
        model = build(program, name, joined_graph(program, name, graph), places, opset=opset)
        values = shape_inference.infer_shapes(model).graph
        kinds = {each.name: each.type.tensor_type.elem_type for each in (*values.value_info, *values.input)}
        for node in nodes(model.graph):
            if node.op_type in SCORES and node.input[0] in kinds:
                ranked += 1
                assert kinds[node.input[0]] in (TensorProto.FLOAT, TensorProto.INT64), node
            if node.op_type == "Attention":
                assert helper.get_node_attr_value(node, "softmax_precision") == TensorProto.FLOAT
    assert ranked > 3


@pytest.mark.slow
@pytest.mark.parametrize("passes", [*PASSES[:3], PASSES[6]])
def test_fp16_runs_as_written(passes: str, tmp_path: Path) -> None:
    found = foveate.export(optimized(passes, torch.float16), output=tmp_path / "out").parity
    assert found is not None and found.ok and found.kept and found.difference < 5e-3
    assert found.ran == "run as written by ONNX Runtime (CPU)"
    eager, there = foveate.load(tmp_path / "out", backend="eager"), foveate.load(tmp_path / "out")
    for prompt in ({}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}):
        inputs = random_inputs(source(torch.float16), **prompt)
        with torch.inference_mode():
            a, b = eager(**inputs), there(**inputs)
        assert b.logits.dtype == torch.float16
        torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=2e-2)
        assert all(torch.equal(b.kept[layer], places) for layer, places in (a.kept or {}).items())
        assert_same_but_for_near_ties(eager, there, inputs)


def assert_same_but_for_near_ties(
    eager: OptimizedModel, there: OptimizedModel, inputs: dict[str, torch.Tensor]
) -> None:
    """The same answers up to where, if at all, two logits are so near each other that rounding decides."""
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    one, other = (each.generate(**inputs, **options) for each in (eager, there))
    start = inputs["input_ids"].shape[1]
    for row, (a, b) in enumerate(zip(one.sequences[:, start:], other.sequences[:, start:], strict=True)):
        step = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if step is not None:
            logits = one.logits[step][row].float()
            assert logits[a[step]] - logits[b[step]] <= 5e-3 * logits.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("passes", [*PASSES[:4], "pyramiddrop{layers=[1],keep=0.5}", PASSES[-1]])
def test_bf16_is_checked_in_another_way_that_says_so(passes: str, tmp_path: Path) -> None:
    found = foveate.export(optimized(passes, torch.bfloat16), output=tmp_path / "out")
    parity = found.parity
    assert parity is not None and parity.ok and parity.difference < 8e-2 and parity.shared >= 0.9
    said = "not run here as written: ONNX Runtime (CPU) has no bfloat16 kernel for Conv, M"
    assert said in str(found) and said in found.to_json()["parity"]["ran"]
    assert not list((tmp_path / "out").glob("*.check.onnx"))
    prefill = onnx.load(tmp_path / "out" / "decoder_prefill.onnx", load_external_data=False)
    assert prefill.graph.output[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    with pytest.raises(BackendError, match="runs no bfloat16"):
        foveate.load(tmp_path / "out")
    assert foveate.load(tmp_path / "out", backend="eager").backend == "eager"


@pytest.mark.parametrize("passes", PASSES[:2])
def test_bf16_graphs_as_written_by_onnx_own_evaluator(passes: str, tmp_path: Path) -> None:
    """An independent one, which knows bfloat16 and rounds each operator's result: the files themselves, no copies."""
    model = optimized(passes, torch.bfloat16)
    foveate.export(model, output=tmp_path / "out", verify=False)
    seen: Seen = {}
    runners = recorded(model.program, lower(model.program, "eager"), seen)
    eager = OptimizedModel(model.program, model.config, model.generation_config, "eager", lambda: runners)
    with torch.inference_mode():
        eager.generate(**random_inputs(source(torch.bfloat16), batch=2), max_new_tokens=2, min_new_tokens=2)
    assert set(seen) == {"vision", "prefill", "decode"}
    for name, (given, wanted) in seen.items():
        evaluator = ReferenceEvaluator(str(tmp_path / "out" / FILES[name]))
        kinds = {each.name: each.type.tensor_type.elem_type for each in evaluator.proto_.graph.input}
        halves = {label for label, kind in kinds.items() if kind == TensorProto.BFLOAT16}
        feed = {k: given[k].astype(ml_dtypes.bfloat16) if k in halves else given[k] for k in kinds}
        for label, value in zip(evaluator.output_names, evaluator.run(None, feed), strict=True):
            expected = wanted[label]
            if expected.dtype == np.int64:
                np.testing.assert_array_equal(value, expected, label)
            else:
                assert value.dtype == ml_dtypes.bfloat16
                most = max(float(np.abs(expected).max()), 1.0)
                np.testing.assert_allclose(value.astype(np.float32), expected, rtol=0, atol=3e-2 * most, err_msg=label)


def test_what_a_copy_gives_is_rounded_behind_every_operator() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n"])
    square = [helper.make_node("Mul", ["x", "x"], ["z"]), helper.make_node("Mul", ["z", "z"], ["y"])]
    model = helper.make_model(helper.make_graph(square, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)])
    copy = in_fp32(model)
    onnx.checker.check_model(copy, full_check=True)
    value = torch.linspace(1, 2, 129).bfloat16()
    (found,) = ReferenceEvaluator(copy).run(None, {"x": value.float().numpy()})
    z = value * value
    assert found.dtype == np.float32 and (found == (z * z).float().numpy()).all()
    assert (found != value.float().pow(4).bfloat16().float().numpy()).any()  # where only the last is rounded


def test_the_backend_refuses_bf16_in_one_line() -> None:
    with pytest.raises(BackendError, match=r"runs no bfloat16, .*exporting works"):
        foveate.optimize(source(torch.bfloat16), backend="onnx")


def test_near_ties_may_fall_otherwise_in_half_precision_alone() -> None:
    exact = Parity(3, 0.0, 1.0, kept=False, tokens=True, shared=0.97)
    near = Parity(3, 0.0, 1.0, kept=False, tokens=True, shared=0.97, shared_least=0.9)
    far = Parity(3, 0.0, 1.0, kept=False, tokens=True, shared=0.8, shared_least=0.9)
    assert (exact.ok, near.ok, far.ok) == (False, True, False)
    assert "OTHER VISUAL TOKENS STAY" in str(exact) and "OTHER VISUAL TOKENS STAY" in str(far)
    assert "97.0% of the visual tokens that stay are the same (90% needed)" in str(near) and "OTHER" not in str(near)


def test_which_share_of_tokens_stays_in_both() -> None:
    pad = package.PAD
    a, b = torch.tensor([[1, 2, 3, 4], [5, 6, pad, pad]]), torch.tensor([[1, 2, 3, 9], [6, 5, pad, pad]])
    assert package._shared([(a, b)]) == pytest.approx(5 / 6)
    assert package._shared([(a, a)]) == package._shared([]) == package._shared([(a[:, :0], a[:, :0])]) == 1.0


@pytest.mark.slow
def test_a_bf16_package_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimized("", torch.bfloat16)
    write = package.artifact.write_model

    def other_weights(given: OptimizedModel, work: Path) -> None:
        state = {k: v * 1.5 if k.endswith("o_proj.weight") else v for k, v in given.state_dict().items()}
        write(given, work, state)

    monkeypatch.setattr(package.artifact, "write_model", other_weights)
    with pytest.raises(ParityError, match="do not agree"):
        foveate.export(model, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_dtype_of_graphs_has_a_tolerance() -> None:
    assert set(package.TOLERANCE) == {dtype for dtype in ELEMENT if dtype.is_floating_point} - {torch.float64}
