"""Every opset that graphs are written in, against eager torch; every other is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import foveate
from foveate import ops
from foveate.backends.onnx import opsets
from foveate.backends.onnx.opsets import IR_VERSIONS, OPSET
from foveate.backends.tensorrt.lint import lint
from foveate.errors import BackendError
from foveate.kernels.reference import varlen_attention
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from tests.backends.onnx.agree import by_runtime

PASSES = (
    "fastervlm{keep=0.7},neighbor-attention{radius=1,layers=[0]},drop-visual-heads{keep=2,from_layer=1},"
    "fastv{layer=1,keep=0.5}"
)
PROMPTS = ({}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}, {"images": 0})


@functools.cache
def model(kv_heads: int | None = 2, dtype: torch.dtype = torch.float32) -> OptimizedModel:
    return foveate.optimize(random_llava(layers=2, kv_heads=kv_heads, dtype=dtype), PASSES)


@pytest.mark.parametrize(("opset", "kv_heads"), [(22, None), *((opset, 2) for opset in IR_VERSIONS)])
def test_a_package_of_each_opset_answers_as_eager_torch_does(opset: int, kv_heads: int | None, tmp_path: Path) -> None:
    eager = model(kv_heads)
    found = foveate.export(eager, output=tmp_path / "out", opset=opset, verify=False)
    assert found.backend == "onnx"
    for path in (tmp_path / "out").glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", opset)]
        kinds = {node.op_type for node in graph.graph.node}
        fused = opset >= 23 and path.stem != "embed_tokens"
        assert bool(kinds & {"Attention", "RMSNormalization"}) == fused
        assert lint(path) == []
    there = foveate.load(tmp_path / "out")
    for prompt in PROMPTS:
        inputs = random_inputs(random_llava(layers=2, kv_heads=kv_heads), **prompt)
        with torch.inference_mode():
            a, b = eager(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (eager, there)]
        torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=1e-5)
        assert all(torch.equal(b.kept[layer], places) for layer, places in (a.kept or {}).items())
        assert torch.equal(*answers)


@pytest.mark.parametrize("opset", [22, OPSET])
def test_attention_with_what_is_added_to_scores(opset: int) -> None:
    q, k, v = draw(3, 2, 4, 5, 8)
    bias = torch.tensor([[0, 0, -1e4, 0, 0], [0, 0, 0, 0, -1e4]])
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias[:, None, None], scale=0.3).transpose(1, 2)
    torch.testing.assert_close(by_runtime(ops.encoder_attention, q, k, v, 0.3, bias, opset=opset), wanted)


@pytest.mark.parametrize("opset", [22, OPSET])
@pytest.mark.parametrize("lengths", [(5, 6), (11,), (2, 0, 9), (0, 11)], ids=str)
def test_attention_over_segments_of_which_some_are_empty(lengths: tuple[int, ...], opset: int) -> None:
    q, k, v = draw(3, 1, 2, 11, 8)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    found = by_runtime(ops.varlen_attention, q, k, v, bounds, 0.3, opset=opset)
    torch.testing.assert_close(found, varlen_attention(q, k, v, bounds, 0.3))


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("opset", [0, 19, 25, 99])
def test_others_are_refused_before_anything_is_written(opset: int, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=f"opset {opset} is not written; there are 20 to 24: before 20 there is no Gelu"
    ):
        foveate.export(model(), output=tmp_path / "out", opset=opset)
    with pytest.raises(BackendError, match="which AOTInductor does not compile"):
        foveate.export(model(), backend="aoti", output=tmp_path / "out", opset=23)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_this_onnx_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opsets, "onnx_opset_version", lambda: 23)
    assert opsets.checked(None, torch.float32) == opsets.checked(23, torch.float32) == 23
    with pytest.raises(BackendError, match="opset 24 needs a newer onnx"):
        opsets.checked(24, torch.float32)


def test_bfloat16_has_fewer(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="bfloat16 is not written in opset 21; there are 22 to 24"):
        foveate.export(model(dtype=torch.bfloat16), output=tmp_path / "out", opset=21)
    found = foveate.export(model(dtype=torch.bfloat16), output=tmp_path / "out", opset=22, verify=False)
    assert found.parity is None and (tmp_path / "out" / "decoder_prefill.onnx").is_file()
