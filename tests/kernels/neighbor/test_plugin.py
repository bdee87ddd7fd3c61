"""Neighbour attention for TensorRT plugins: what it computes, in Triton's interpreter, and what it compiles to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest

from foveate.errors import BackendError
from foveate.kernels.neighbor import plugin
from foveate.kernels.neighbor.offline import SHARED_LIMIT, resources
from foveate.kernels.neighbor.plugin import PluginKernel
from tests.kernels.neighbor import plugin_cases

ROOT = Path(__file__).parents[3]
KERNEL = PluginKernel(
    heads=28,
    key_heads=4,
    size=128,
    height=24,
    width=24,
    radius=2,
    euclidean=False,
    causal=True,
    text=True,
    dtype="bfloat16",
    scale=128**-0.5,
)
OTHER = PluginKernel(32, 32, 64, 5, 7, 5, True, False, False, "bfloat16", 0.125)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Errors of all cases, from one process."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", plugin_cases.__name__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", plugin_cases.CASES)
def test_it_equals_the_oracle(name: str, errors: dict[str, float]) -> None:
    assert errors[name] <= 1e-5


@pytest.mark.parametrize("kernel", [KERNEL, OTHER], ids=["seven heads a key head", "a head each"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_its_entry_takes_what_a_plugin_gives(capability: int, kernel: PluginKernel) -> None:
    pytest.importorskip("triton")
    made = kernel.ptx(capability)
    assert f".entry {made.entry}(" in made.ptx
    # Six inputs, two lengths and the output; Triton's own, which nobody would give, are gone.
    kinds = re.findall(r"\.param \.([bu]\d+)(?: \.ptr)?", made.ptx[: made.ptx.index(".reqntid")])
    pointers, lengths = {"b64", "u64"}, {"b32", "u32"}
    assert [kind in pointers for kind in kinds] == [True] * 6 + [False] * 2 + [True]
    assert all(kind in lengths for kind in kinds[6:8])
    read = {int(number) for number in re.findall(r"ld\.param\S* .*_param_(\d+)\]", made.ptx)}
    assert read and max(read) == len(kinds) - 1
    assemble(made.ptx, capability)
    assert ".loc" not in made.ptx and "triton_plugin.py" not in made.ptx  # no paths of this machine
    assert f".reqntid {32 * made.warps}\n" in made.ptx
    assert 0 < made.shared <= SHARED_LIMIT[capability]
    assert made.tiles == {KERNEL: 72, OTHER: 1}[kernel]


def test_scratch_memory_is_refused() -> None:
    pytest.importorskip("triton")
    ptx = OTHER.ptx(80).ptx
    read = ptx.replace("plugin_forward_param_8\n)", "plugin_forward_param_8,\n.param .u64 scratch\n)")
    assert read != ptx
    with pytest.raises(BackendError, match=r"wants scratch memory \(scratch\), which no plugin can give"):
        plugin._own_parameters(read.replace("ret;", "ld.param.b64 %rd1, [scratch];\nret;"))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_takes_no_more_of_a_gpu_than_the_forward_kernel_may(capability: int) -> None:
    pytest.importorskip("triton")
    assert resources(KERNEL.launch(), capability).faults() == []


def assemble(ptx: str, capability: int) -> None:
    """Whether NVIDIA's assembler, which comes with Triton, takes the code."""
    import triton

    tool = "ptxas-blackwell" if capability >= 100 else "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None and target[1].startswith(f"sm_{capability}")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    command = [path, f"-arch={target[1]}", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_identifiers_and_differ() -> None:
    changed = {"heads": 8, "key_heads": 2, "size": 64, "height": 12, "width": 12, "radius": 3, "euclidean": True}
    changed |= {"causal": False, "text": False, "dtype": "float16", "scale": 0.1}
    assert set(changed) == {field.name for field in fields(PluginKernel)}
    names = [KERNEL.name, *(replace(KERNEL, **{name: value}).name for name, value in changed.items())]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in names)
    assert KERNEL.name == "neighbor_attention_h28_k4_e128_24x24_r2_causal_text_bfloat16_3fb6a09e667f3bcd"


def test_what_does_not_compile_is_told() -> None:
    with pytest.raises(BackendError, match="compute capabilities 80, 90, 100, not for 75"):
        KERNEL.ptx(75)
    with pytest.raises(BackendError, match="the head size is 256, this form takes 16 to 128"):
        replace(KERNEL, size=256).ptx(90)
    missing = pytest.raises(BackendError, match="Triton, which is not installed")
    with mock.patch.dict(sys.modules, {"triton": None}), missing:
        KERNEL.ptx(90)


def test_too_much_shared_memory_is_told() -> None:
    pytest.importorskip("triton")
    with (
        mock.patch.dict(plugin.SHARED_LIMIT, {80: 1024}),
        pytest.raises(BackendError, match="needs 53248 bytes of shared memory, 1024 is the limit"),
    ):
        KERNEL.ptx(80)
