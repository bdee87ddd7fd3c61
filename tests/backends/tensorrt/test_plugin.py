"""Neighbour attention as a TensorRT plugin: what is exported, what its kernels are told, and how they are launched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import foveate
from foveate.backends.base import lower
from foveate.backends.onnx.lowering import Seen, recorded
from foveate.backends.tensorrt import plugin
from foveate.errors import BackendError
from foveate.kernels.neighbor.plugin import PluginKernel
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs
from tests.ir.programs import llava

ROOT = Path(__file__).parents[3]
PASSES = "neighbor-attention{radius=1}, drop-visual-neurons{keep=0.5}"
SIZES = {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "visual_tokens": 25}
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
pytestmark = pytest.mark.skipif(find_spec("polygraphy") is None, reason="polygraphy is not installed")


@pytest.fixture(scope="module")
def optimized() -> OptimizedModel:
    return foveate.optimize(llava(**SIZES), passes=PASSES)


@pytest.fixture(scope="module")
def package(optimized: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin") / "package"
    exported = foveate.export(optimized, "tensorrt", output=folder, plugin=True)
    assert exported.parity is not None and exported.parity.ok
    return folder


@triton
def test_the_copy_for_tensorrt_has_plugin_nodes_and_no_mask(package: Path) -> None:
    whole, copy = (onnx.load(package / f"decoder_prefill{end}.onnx", load_external_data=False) for end in ("", ".trt"))
    calls = [node for node in whole.graph.node if node.domain == "foveate"]
    nodes = [node for node in copy.graph.node if node.op_type == plugin.NAME]
    assert len(calls) == len(nodes) == 2 and len(whole.functions) == 1
    assert not copy.functions and [entry.domain for entry in copy.opset_import] == [""]
    (name,) = plugin.kernels(whole)
    for call, node in zip(calls, nodes):
        assert list(node.input) == list(call.input)[:6] and list(node.output) == list(call.output)
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"kernel": name.encode(), "plugin_namespace": b"foveate", "aot": 1}
    # What made the mask of the neighbours went with it; what makes that of the text stays.
    made = {output for node in copy.graph.node for output in node.output}
    assert calls[0].input[6] not in made
    read = {name for node in copy.graph.node for name in node.input} | {output.name for output in copy.graph.output}
    assert all(set(node.output) & read for node in copy.graph.node)
    given = [{i.name for i in each.graph.input} for each in (whole, copy)]
    assert given[0] - given[1] == {"visual_coords"}
    script = (package / "trt" / "build_decoder_prefill.py").read_text()
    assert "visual_coords" not in script and "visual_order" in script
    assert plugin.kernels(whole)[name] == PluginKernel(
        4, 2, 16, 5, 5, 1, euclidean=False, causal=False, text=True, dtype="float32", scale=0.25
    )


@triton
def test_the_files_of_the_plugin(package: Path) -> None:
    table = json.loads((package / "trt" / "plugin.json").read_text())["kernels"]
    (kernel,) = table.values()
    assert set(kernel) == {"80", "90", "100"}
    for about in kernel.values():
        code = (package / "trt" / about["file"]).read_bytes()
        assert hashlib.sha256(code).hexdigest() == about["sha256"]
        assert f".entry {about['entry']}(".encode() in code and about["key_heads"] == 2
    built = (package / "trt" / "build_decoder_prefill.py").read_text()
    compile(built, "build", "exec")
    assert built.index("import foveate_plugin") < built.index("from polygraphy")
    assert "foveate_plugin" not in (package / "trt" / "build_decoder_step.py").read_text()
    trtexec = (package / "trt" / "trtexec.sh").read_text()
    assert "# decoder_prefill has nodes for a plugin" in trtexec and "--onnx=decoder_prefill" not in trtexec
    assert foveate.load(package).generate is not None


PROMPTS: dict[str, dict[str, Any]] = {
    "one": {},
    "two images": {"images": 2},
    "ends in its image": {"text_tokens": 4},
    "ends in its second image": {"images": 2, "text_tokens": 5},
    "left": {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    "right": {"batch": 2, "images_per_row": [1, 2], "padding": "right", "prefix": 0},
}


def values(optimized: OptimizedModel, package: Path, sizes: dict[str, Any]) -> list[np.ndarray]:
    """What the first call of the prefill is given, and what it gives, on a prompt; ONNX Runtime's."""
    seen: Seen = {}
    runners = recorded(optimized.program, lower(optimized.program, "eager"), seen)
    model = OptimizedModel(optimized.program, optimized.config, optimized.generation_config, "eager", lambda: runners)
    with torch.inference_mode():
        inputs = random_inputs(llava(**SIZES), **sizes)
        if "text_tokens" in sizes:  # one behind the images, which goes
            inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        model(**inputs)
    graph = onnx.load(package / "decoder_prefill.onnx", load_external_data=False)
    call = next(node for node in graph.graph.node if node.domain == "foveate")
    wanted = [*call.input[:6], call.output[0]]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    path = package / "wanted.onnx"
    path.write_bytes(graph.SerializeToString())
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = {given.name for given in session.get_inputs()}
        found = session.run(wanted, {name: value for name, value in seen["prefill"][0].items() if name in names})
    finally:
        path.unlink()
    return [np.asarray(value) for value in found]


@triton
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_kernel_gives_what_the_standard_operators_give(
    prompt: str, optimized: OptimizedModel, package: Path, tmp_path: Path
) -> None:
    q, k, v, text_k, text_v, images, expected = values(optimized, package, PROMPTS[prompt])
    assert q.shape[2] % 25 == (24 if prompt.startswith("ends") else 0)
    assert images.shape == (q.shape[0] * -(-q.shape[2] // 25), 8) and images.dtype == np.int32
    np.savez(tmp_path / "given.npz", q=q, k=k, v=v, text_k=text_k, text_v=text_v, images=images)
    (kernel,) = plugin.kernels(onnx.load(package / "decoder_prefill.onnx", load_external_data=False)).values()
    program = (
        "import sys, numpy as np, torch\n"
        "from foveate.kernels.neighbor.plugin import PluginKernel\n"
        "from foveate.kernels.neighbor.triton_plugin import plugin_forward\n"
        f"kernel = {kernel!r}\n"
        "given = {name: torch.from_numpy(value) for name, value in np.load(sys.argv[1]).items()}\n"
        "q = given['q']\n"
        "o = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), float('nan'))\n"
        "grid = (len(given['images']) * kernel.tiles, kernel.key_heads)\n"
        "plugin_forward[grid](**given, tokens=q.shape[2], text_tokens=given['text_k'].shape[2], o=o, "
        "**kernel.constants)\n"
        "np.save(sys.argv[2], o.numpy())\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    files = [str(tmp_path / "given.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", program, *files], env=environment, check=True)
    out = np.load(tmp_path / "out.npy")
    assert np.isfinite(out).all()
    there = np.zeros(out.shape[:2], dtype=bool)
    for row, count in enumerate(PROMPTS[prompt].get("images_per_row", [PROMPTS[prompt].get("images", 1)])):
        there[row, : 25 * count] = True
    np.testing.assert_allclose(out[there], expected[there], atol=1e-5)


class Number:
    """A size that TensorRT knows when the engine runs."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __mul__(self, other: int) -> Number:
        return Number(f"{self.text} * {other}")


class Described:
    """A tensor as the plugin's functions see it."""

    def __init__(self, name: str) -> None:
        self.dtype = "half"
        self.shape_expr = [Number(f"{name}.{axis}") for axis in range(4)]


@pytest.fixture
def target(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package's script as the machine with TensorRT imports it, but for TensorRT and the GPU."""
    trtp: Any = types.ModuleType("tensorrt.plugin")
    trtp.registered = {}
    for name in ("register", "aot_impl"):
        setattr(
            trtp, name, lambda plugin, kind=name: lambda function: trtp.registered.setdefault((kind, plugin), function)
        )
    trtp.TensorDesc, trtp.SymExprs, trtp.KernelLaunchParams = Described, object, types.SimpleNamespace
    trtp.SymInt32, trtp.SymIntExprs = lambda number: number.text, lambda count: [None] * count
    trtp.from_shape_expr = lambda shape, dtype: ([number.text for number in shape], dtype)
    whole: Any = types.ModuleType("tensorrt")
    whole.plugin = trtp
    monkeypatch.setitem(sys.modules, "tensorrt", whole)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    spec = spec_from_file_location("foveate_plugin", package / "trt" / "foveate_plugin.py")
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.registered = trtp.registered
    yield module


@triton
def test_the_script_tells_tensorrt_shapes_and_launches(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("q", "k", "v", "text_k", "text_v", "images")
    inputs = [Described(name) for name in names]
    (kernel,) = target.KERNELS
    describe = target.registered["register", "foveate::neighbor_attention"]
    assert describe(*inputs, kernel) == (["q.0", "q.2", "q.1", "q.3"], "half")
    monkeypatch.setattr(target, "capability", lambda: 90)
    launch = target.registered["aot_impl", "foveate::neighbor_attention"]
    entry, code, how, numbers = launch(*inputs, kernel, (Described("o"),), 0)
    about = target.KERNELS[kernel]["90"]
    assert f".entry {entry}(" in code and ".target sm_90" in code
    assert how.grid_x.text == f"images.0 * {about['tiles']}" and how.grid_y == 2
    assert (how.block_x, how.shared_mem) == (about["threads"], about["shared_bytes"])
    assert numbers == ["q.2", "text_k.2"]
    assert ".target sm_80" in target.chosen(kernel, 89)["code"]


@triton
def test_the_script_refuses_what_was_changed_and_gpus_that_lack_something(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel,) = target.KERNELS
    with pytest.raises(SystemExit, match=r"8\.0 or later, and this GPU has 7\.5"):
        target.chosen(kernel, 75)
    with pytest.raises(SystemExit, match="is not among the kernels"):
        target.chosen("another", 80)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"compute capability 8\.9 may not have"):
        patch.setitem(target.KERNELS[kernel]["80"], "shared_bytes", 120_000)
        target.chosen(kernel, 89)
    target.HERE = tmp_path
    (tmp_path / target.KERNELS[kernel]["80"]["file"]).write_text("changed")
    with pytest.raises(SystemExit, match="is not the file that was exported"):
        target.chosen(kernel, 80)


@pytest.mark.parametrize(
    "passes", ["", "neighbor-attention{radius=1,metric=raster}", f"divprune{{keep=0.5}}, {PASSES}"]
)
def test_a_plugin_with_nothing_to_do_is_refused(passes: str, tmp_path: Path) -> None:
    optimized = foveate.optimize(llava(**SIZES), passes=passes)
    with pytest.raises(BackendError, match="the plugin has nothing to do here: it runs neighbor-attention"):
        foveate.export(optimized, "tensorrt", output=tmp_path / "out", plugin=True, verify=False)
    assert not (tmp_path / "out").exists()


def test_other_backends_have_no_plugin(optimized: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the plugin is TensorRT's"):
        foveate.export(optimized, "onnx", output=tmp_path / "out", plugin=True)
