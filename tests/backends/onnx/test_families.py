"""Every family that runs, on ONNX Runtime: as on torch, from one export, whatever the grids."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate import ops
from foveate.backends.base import lower_graph
from foveate.errors import BackendError
from foveate.ir.program import NodeInfo, Program
from foveate.ir.rewriter import Rewriter
from foveate.kernels.reference import varlen_attention
from tests.models.prompts import made
from tests.models.test_running import MODELS, VIDEOS, source, traced

PIPELINES = (
    "",
    "neighbor-attention{radius=1},drop-visual-heads{keep=2,from_layer=0},drop-visual-neurons{keep=0.5},"
    "fastv{layer=1,keep=0.5},cut-visual{from_layer=2}",
)


@pytest.mark.slow
@pytest.mark.parametrize("passes", PIPELINES, ids=["dense", "pruned"])
@pytest.mark.parametrize("name", MODELS)
def test_a_package_answers_as_torch_does(name: str, passes: str, tmp_path: Path) -> None:
    if name == "gemma3":
        passes = passes.removeprefix("neighbor-attention{radius=1},")  # which refuses images that are seen whole
    if name == "qwen3-vl-moe":
        passes = passes.replace("drop-visual-neurons{keep=0.5},", "")  # which refuses experts
    eager = foveate.optimize(source(name), passes, traced=traced(name))
    found = foveate.export(eager, output=tmp_path / "out")
    assert found.parity is not None and found.parity.ok and found.parity.tokens and found.parity.difference < 1e-5
    there = foveate.load(tmp_path / "out")
    rows = [[[1]], [[2], [0], [1]], [[0]], *([[[1, 1], [0, 2]]] if name in VIDEOS else [])]
    for seed, counts in enumerate(rows):
        inputs = made(source(name), seed, counts).inputs
        with torch.inference_mode():
            a, b = eager(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (eager, there)]
        largest = max(float(a.logits.abs().max()), 1.0)
        torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=1e-5 * largest)
        for layer, places in (a.kept or {}).items():
            assert torch.equal(b.kept[layer], places)
        assert torch.equal(*answers)
    if not eager.program.info.uniform:
        with pytest.raises(BackendError, match="says nothing of its prompts, so images are not all of one grid"):
            foveate.load(tmp_path / "out", tensors="np")


def segments(lengths: tuple[int, ...]) -> dict[str, Any]:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8, generator=torch.Generator().manual_seed(0))
    return {"q": q, "k": k, "v": v, "cu_seqlens": bounds}


def test_attention_of_a_packed_sequence_over_any_segments() -> None:
    program = Program(traced("qwen2-vl").info, traced("qwen2-vl").weights, traced("qwen2-vl").symbols)
    edit = Rewriter(program, torch.fx.Graph(), by="test")
    about, tensor = NodeInfo(0, "test"), functools.partial(program.symbols.tensor, device="cpu")
    fakes = {name: tensor(1, 2, "patches", 8, dtype=torch.float32) for name in "qkv"}
    fakes["cu_seqlens"] = tensor(program.symbols["images"] + 1, dtype=torch.int32)
    given = [edit.placeholder(name, fake, about) for name, fake in fakes.items()]
    edit.output({"out": edit.call(ops.varlen_attention, *given, 0.3, about=about)})
    run = lower_graph(program, "onnx", "vision", edit.graph)
    for lengths in ((5,), (1, 7, 3), (4, 4, 4), (2, 0, 3), (0, 2)):
        inputs = segments(lengths)
        np.testing.assert_allclose(run(inputs)["out"], varlen_attention(**inputs, scale=0.3), atol=1e-6)
