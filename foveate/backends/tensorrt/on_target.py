"""Registers foveate's neighbour attention with TensorRT; EXPERIMENTAL, not run with TensorRT yet.

The kernels beside this file were compiled ahead of time; the engine that is built holds the one for its GPU. Needs
TensorRT 10.9 or later and Linux. Import it before an engine is built; running the engine needs nothing of it.
"""

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import tensorrt.plugin as trtp

PLUGIN = "foveate::neighbor_attention"
HERE = Path(__file__).resolve().parent
KERNELS: dict[str, Any] = json.loads((HERE / "plugin.json").read_text(encoding="utf-8"))["kernels"]

LEAST_SHARED_BYTES = 99 * 1024
"""Shared memory that a block can have on every GPU from 8.0 on; those that kernels are compiled for have more."""


def capability() -> int:
    """Ten times the compute capability of GPU 0."""
    driver = ctypes.CDLL("libcuda.so.1")
    found = []
    for attribute in (75, 76):  # the major and the minor number
        value = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0):
            raise SystemExit("foveate's plugin needs an NVIDIA GPU, and the driver found none")
        found.append(value.value)
    return 10 * found[0] + found[1]


def chosen(kernel: str, gpu: int) -> dict[str, Any]:
    """How a kernel is launched on a GPU, and its code: that for the very GPU, or for 8.0, which later ones run too."""
    if kernel not in KERNELS:
        raise SystemExit(f"{kernel} is not among the kernels of {HERE / 'plugin.json'}")
    if gpu < 80:
        raise SystemExit(f"the kernels need compute capability 8.0 or later, and this GPU has {gpu / 10:.1f}")
    about: dict[str, Any] = KERNELS[kernel].get(str(gpu), KERNELS[kernel]["80"])
    if str(gpu) not in KERNELS[kernel] and about["shared_bytes"] > LEAST_SHARED_BYTES:
        raise SystemExit(
            f"{kernel} needs {about['shared_bytes']} bytes of shared memory, which GPUs of compute capability "
            f"{gpu / 10:.1f} may not have; export without the plugin for them"
        )
    code = (HERE / about["file"]).read_bytes()
    if hashlib.sha256(code).hexdigest() != about["sha256"]:
        raise SystemExit(f"{HERE / about['file']} is not the file that was exported")
    return {**about, "code": code.decode()}


@trtp.register(PLUGIN)
def describe(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    text_k: trtp.TensorDesc,
    text_v: trtp.TensorDesc,
    images: trtp.TensorDesc,
    kernel: str,
) -> trtp.TensorDesc:
    """q [batch, heads, tokens, size] -> [batch, tokens, heads, size]."""
    batch, heads, tokens, size = (q.shape_expr[axis] for axis in range(4))
    return trtp.from_shape_expr((batch, tokens, heads, size), dtype=q.dtype)


@trtp.aot_impl(PLUGIN)
def launch(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    text_k: trtp.TensorDesc,
    text_v: trtp.TensorDesc,
    images: trtp.TensorDesc,
    kernel: str,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
    """The kernel, how it is launched, and the two numbers that stand between its inputs and its output."""
    about = chosen(kernel, capability())
    how = trtp.KernelLaunchParams()
    how.grid_x, how.grid_y = images.shape_expr[0] * about["tiles"], about["key_heads"]
    how.block_x, how.shared_mem = about["threads"], about["shared_bytes"]
    numbers = trtp.SymIntExprs(2)
    numbers[0], numbers[1] = trtp.SymInt32(q.shape_expr[2]), trtp.SymInt32(text_k.shape_expr[2])
    return about["entry"], about["code"], how, numbers
