"""Weights beyond 2 GiB, which no ONNX file may hold: they lie outside, in one file, and graphs are read by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import foveate
from foveate.models.random import random_inputs, random_llava

LIMIT = 2**31
HIDDEN = 64


@pytest.mark.slow
def test_a_package_whose_weights_exceed_what_a_protobuf_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llava(layers=2, hidden=HIDDEN)
    words = model.model.language_model.embed_tokens
    rows = LIMIT // (4 * HIDDEN) + 1000
    table = torch.zeros(rows, HIDDEN)  # pages that nobody writes take no memory
    table[:128] = words.weight.detach()
    table[-1000:] = torch.randn(1000, HIDDEN, generator=torch.Generator().manual_seed(0))
    words.weight, words.num_embeddings = nn.Parameter(table), rows

    checked: list[Any] = []
    check = onnx.checker.check_model

    def checks(given: Any, **options: Any) -> None:
        checked.append(given)
        check(given, **options)

    monkeypatch.setattr(onnx.checker, "check_model", checks)
    eager = foveate.optimize(model, "fastv{layer=1,keep=0.5}")
    found = foveate.export(eager, output=tmp_path / "out")
    assert found.parity is not None and found.parity.ok and found.parity.difference <= 1e-5
    assert found.bytes["model.safetensors"] > LIMIT
    assert len(checked) == 4 and all(isinstance(each, str) for each in checked)

    largest, farthest = 0, 0
    for path in (tmp_path / "out").glob("*.onnx"):
        assert path.stat().st_size < 2**20
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entry = {each.key: each.value for each in tensor.external_data}
            assert entry.get("location", "model.safetensors") == "model.safetensors"
            largest = max(largest, int(entry.get("length", 0)))
            farthest = max(farthest, int(entry.get("offset", 0)))
    assert largest > LIMIT and farthest > LIMIT

    inputs = random_inputs(model)
    ids = inputs["input_ids"]
    ids[:, -3:] = torch.tensor([rows - 1, rows - 500, rows - 1000])  # words that lie behind the limit
    there = foveate.load(tmp_path / "out", tensors="np")
    with torch.inference_mode():
        expected = eager(**inputs).logits.numpy()
    given = {name: value.numpy() for name, value in inputs.items()}
    assert abs(there(**given).logits - expected).max() <= 1e-5
    assert json.loads((tmp_path / "out" / "foveate.json").read_text())["prompts"]["vocabulary"] == rows
