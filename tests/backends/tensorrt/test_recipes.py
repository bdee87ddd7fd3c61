"""Every shipped recipe, exported for TensorRT: the lint passes, and Polygraphy compares ONNX Runtime with torch."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import foveate
from foveate.backends.tensorrt import prepare
from foveate.backends.tensorrt.lint import lint
from foveate.models import digits
from foveate.models.random import random_llava
from foveate.passes.pipeline import recipes
from tests.models import tiny

GRAPHS = ("vision_encoder", "decoder_prefill", "decoder_step")


def sized(layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """A decoder as deep and with as many heads as the real one, and narrow."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads,
    }


SOURCES: dict[str, Any] = {
    "digits": lambda: digits.load()[0],
    "llava-1.5-7b": lambda: random_llava(layers=32, heads=32, hidden=256),
    "llava-1.5-13b": lambda: random_llava(layers=40, heads=40, hidden=320),
    "internvl2-4b": lambda: narrow(tiny.internvl("phi3", **sized(32, 32, 32))),
    "internvl2-8b": lambda: narrow(tiny.internvl("llama", **sized(32, 32, 8))),
    "internvl2-26b": lambda: narrow(tiny.internvl("llama", **sized(48, 48, 8))),
    "qwen2-vl-7b": lambda: narrow(tiny.qwen2_vl(text=sized(28, 28, 4))),
}


def narrow(model: Any) -> Any:
    """The same with weights that do not grow what they are given, so that rounding stays rounding over 48 layers."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(weight[0].numel() ** -0.5 / 0.3)
    return model


def named(path: Path) -> list[str]:
    """The models that a recipe is for."""
    models: list[str] = yaml.safe_load(path.read_text()).get("models", ["digits"])
    return models


PAIRS = [(recipe, model) for recipe, path in sorted(recipes().items()) for model in named(path)]


COMPARED = [("digits-yopo", "digits"), ("yopo-25", "llava-1.5-7b"), ("yopo-qwen2-vl-heads", "qwen2-vl-7b")]
"""Those that are run as well; each takes minutes."""


@functools.cache
def traced(model: str) -> Any:
    source = SOURCES[model]()
    return source, foveate.trace(source)


def optimized(recipe: str, model: str) -> Any:
    source, program = traced(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small models gain nothing, which a recipe says
        return foveate.optimize(source, f"recipe:{recipe}", traced=program)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "model"), PAIRS)
def test_tensorrts_parser_would_take_every_graph_of_every_shipped_recipe(
    recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "importable", lambda: False)
    run = (recipe, model) in COMPARED
    found = foveate.export(optimized(recipe, model), backend="tensorrt", output=tmp_path / "out", verify=run)
    if run:
        assert found.parity is not None and found.parity.ok and found.parity.tokens and found.parity.difference < 1e-5
    assert found.tensorrt.status == prepare.PREPARED
    graphs = json.loads((tmp_path / "out" / "trt" / "lint.json").read_text())["graphs"]
    assert set(graphs) == {*GRAPHS, "embed_tokens"}
    for path in (tmp_path / "out").glob("*.onnx"):
        assert lint(path) == [], path.name


def polygraphy_run(package: Path, graph: str, tolerance: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    words = ["run", f"{graph}.onnx", "--onnxrt", "--providers", "cpu"]
    words += ["--load-inputs", f"trt/{graph}.in.json", "--load-outputs", f"trt/{graph}.out.json"]
    words += ["--compare", "simple", "--atol", tolerance, "--rtol", tolerance]
    return subprocess.run([sys.executable, "-c", program, *words], cwd=package, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("polygraphy") is None, reason="polygraphy is not installed")
@pytest.mark.parametrize(("recipe", "model"), COMPARED)
def test_polygraphy_finds_onnx_runtime_close_to_torch_and_not_equal(
    recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "importable", lambda: False)
    package = tmp_path / "out"
    foveate.export(optimized(recipe, model), backend="tensorrt", output=package, verify=False)
    for graph in GRAPHS:
        close, exact = (polygraphy_run(package, graph, tolerance) for tolerance in ("1e-4", "1e-9"))
        assert close.returncode == 0 and "PASSED" in close.stdout, close.stdout[-2000:] + close.stderr[-2000:]
        assert exact.returncode != 0 and "FAILED" in exact.stdout, graph
