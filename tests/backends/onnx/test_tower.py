"""What chooses and merges visual tokens does the same in ONNX Runtime: op by op, and in whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, fx

from foveate import export, load, ops, optimize, trace
from foveate.backends.onnx.emit import ELEMENT, Emitter
from foveate.backends.onnx.graphs import WRITERS
from foveate.backends.onnx.opsets import IR_VERSIONS, OPSET
from foveate.ir.program import Program
from foveate.models.random import random_inputs, random_llava
from foveate.passes import CDPruner
from tests.passes.test_cdpruner import asked, made_for

PASSES = [
    "divprune{keep=0.5}",
    "visionzip{dominant=5,contextual=3}",
    "prumerge{keep=0.5}",
    "prumerge{keep=0.5,plus=true}",
    "prumerge",
    "prumerge{plus=true}",
    "vispruner{keep=0.5}",
    "tome{merge=0.3}",
    "crossget{merge=0.3}",
    "cdpruner{keep=0.5,clip=none}",
    "tome{merge=0.3},divprune{keep=0.6}",
    "cls-curve{layer=1}",
]

PROMPTS: list[dict[str, Any]] = [{}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}, {"images": 0}]


@pytest.fixture(scope="module")
def traced():
    model = random_llava(layers=2)
    return model, trace(model)


@pytest.mark.parametrize("passes", PASSES)
def test_a_model_keeps_and_says_in_onnx_runtime_what_it_does_in_torch(traced, passes):
    model, program = traced
    eager, exported = (optimize(model, passes, traced=program, backend=backend) for backend in ("eager", "onnx"))
    for prompt in PROMPTS:
        inputs = random_inputs(model, **prompt)
        with torch.inference_mode():
            a, b = eager(**inputs), exported(**inputs)
        assert (a.logits - b.logits).abs().max() <= 1e-5
        assert a.kept.keys() == b.kept.keys()
        assert all(torch.equal(a.kept[layer], b.kept[layer]) for layer in a.kept)
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(eager.generate(**inputs, **options), exported.generate(**inputs, **options))


def test_a_question_chooses_the_same_tokens(traced, tmp_path):
    model, program = traced
    made_for(model, tmp_path)
    passes = [CDPruner(0.4, clip=str(tmp_path), theta=0.5)]
    eager, exported = (optimize(model, passes, traced=program, backend=backend) for backend in ("eager", "onnx"))
    inputs = random_inputs(model, **PROMPTS[1])
    with torch.inference_mode():
        a, b = (each(**inputs, questions=asked(3)) for each in (eager, exported))
    assert (a.logits - b.logits).abs().max() <= 1e-5
    assert torch.equal(a.kept[0], b.kept[0])


def run(program: Program, target: Any, *args: Any) -> list[Tensor]:
    """An op's results in ONNX Runtime; the number of images is left open."""
    graph = fx.Graph()
    given: dict[str, Tensor] = {}
    nodes = []
    for number, arg in enumerate(args):
        node = arg
        if isinstance(arg, Tensor):
            given[f"x{number}"] = arg
            node = graph.placeholder(f"x{number}")
            node.meta["val"] = arg
        nodes.append(node)
    call = graph.call_function(target, tuple(nodes))
    emit = Emitter(program, {}, "", WRITERS)
    emit.run(graph)
    found = emit.values[call]
    names = [found] if isinstance(found, str) else list(found)
    wanted = target(*args)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    body, constants = emit.used(names)
    read = [
        helper.make_tensor_value_info(name, ELEMENT[x.dtype], ["images", *x.shape[1:]]) for name, x in given.items()
    ]
    written = [
        helper.make_tensor_value_info(name, ELEMENT[x.dtype], ["images", *x.shape[1:]])
        for name, x in zip(names, wanted, strict=True)
    ]
    model = helper.make_model(
        helper.make_graph(body, "op", read, written, constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSIONS[OPSET],
    )
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(np.asarray(value)) for value in session.run(names, {k: v.numpy() for k, v in given.items()})
    ]


def check(program: Program, target: Any, *args: Any) -> None:
    wanted = target(*args)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    for ours, theirs in zip(run(program, target, *args), wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(ours, theirs)


SIZES = [(1, 7), (3, 36), (2, 300)]
"""Images, and tokens of each; more than the kernels' tiles hold."""


def tokens(images: int, count: int, width: int = 24) -> tuple[Tensor, Tensor]:
    """Random tokens, and scores with many ties."""
    chance = torch.Generator().manual_seed(images * count)
    x = torch.randn(images, count, width, generator=chance)
    return x, torch.randint(0, max(4, count // 3), (images, count), generator=chance) / 16


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_picks_one_by_one_are_those_of_the_kernels(traced, size):
    x, row = tokens(*size)
    check(traced[1], ops.diverse_scores, x, 0.3)
    check(traced[1], ops.determinant_scores, x, None, 0.3, None)
    check(traced[1], ops.determinant_scores, x, row + 0.1, 0.3, 0.5)
    check(traced[1], ops.distinct_scores, row, x, 0.4, 0.5)
    check(traced[1], ops.distinct_scores, row, x, 0.4, 1.0)
    check(traced[1], ops.relevance, x, x.mean(1))


def test_tokens_that_are_no_longer_new_are_picked_in_order(traced):
    x = torch.eye(6)[[0, 1, 0, 1, 2, 2, 3, 0]][None]
    check(traced[1], ops.determinant_scores, x, None, 1.0, None)
    check(traced[1], ops.diverse_scores, x, 1.0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_of_merged_tokens_are_those_of_the_kernels(traced, size):
    x, row = tokens(*size)
    for dominant, contextual in ((3, 2), (4, 0), (0, 3), (2, 5)):
        check(traced[1], ops.visionzip, row, x, dominant, contextual)
    for keep in (None, 0.5, 1.0):
        for plus in (False, True):
            check(traced[1], ops.prumerge, row**3, x, keep, plus, 8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matchings_are_those_of_the_kernels(traced, size):
    images, count = size
    x, row = tokens(images, count, 16)
    keys = x.unflatten(2, (2, 8)).transpose(1, 2).contiguous()
    place = torch.arange(count).repeat(images, 1).flip(1).contiguous()
    for merge in (0, 1, (count - 2) // 2):
        for sizes in (None, 1 + 4 * row):
            for sort in (False, True):
                check(traced[1], ops.tome, keys, sizes, place, merge, sort)
            check(traced[1], ops.crossget, keys, row, sizes, place, merge)
    check(traced[1], ops.received, keys, keys.flip(2).contiguous(), 0.3, None)
    check(traced[1], ops.received, keys, keys.flip(2).contiguous(), 0.3, row.log())
    into, weight, _, _ = ops.tome(keys, None, place, 2, True)
    check(traced[1], ops.join_tokens, x, into, weight, 2)


@pytest.mark.parametrize("mode", ["expand", "literal", "floor_add"])
@pytest.mark.parametrize("size", [(1, 2), *SIZES], ids=str)
def test_curves_turn_where_those_of_the_kernels_do(traced, size, mode):
    x, _ = tokens(*size)
    for alpha in (0.075, 0.6, 1.1):
        check(traced[1], ops.cls_curve, x, alpha, mode)
    check(traced[1], ops.cls_curve, torch.ones_like(x), 0.1, mode)
    check(traced[1], ops.padded_keys, x, torch.arange(size[0]) + 1)


@pytest.mark.slow
def test_a_package_holds_both_halves_of_a_tower_that_cuts_by_image(traced, tmp_path):
    model, program = traced
    cut = optimize(model, "cls-curve{layer=1}", traced=program)
    export(cut, output=tmp_path / "package", verify=False)
    inputs = random_inputs(model, batch=2, images=2)
    with torch.inference_mode():
        a, b = cut(**inputs), load(tmp_path / "package")(**inputs)
    assert (tmp_path / "package" / "vision_rest.onnx").is_file()
    assert (a.logits - b.logits).abs().max() <= 1e-5
    assert torch.equal(a.kept[0], b.kept[0])
