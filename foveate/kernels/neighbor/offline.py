"""Compiles a launch for a GPU that need not be there, and reads from the machine code what it would take of one.

The tools come with Triton's wheel. Tensors may be on the meta device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.neighbor.triton_configs import backward_configs, forward_config
from foveate.kernels.neighbor.triton_launch import dkv_launch, dq_launch, forward_launch, text_launch
from foveate.kernels.neighbor.triton_problem import Launch, Problem

MOST_REGISTERS = 255
"""Of one thread."""

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program can have, by ten times the compute capability."""

MATRIX = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}
"""Opcodes of matrix instructions, the GPU's own first."""

ASYNC_COPY = ("LDGSTS", "UTMALDG")

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes: registers of a thread, bytes spilled, bytes of shared memory.

    matrix and copies: how often the machine code holds each matrix instruction and each asynchronous copy.
    """

    capability: int
    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    copies: dict[str, int]

    def faults(self) -> list[str]:
        """What makes the kernel unfit for its GPU; empty if nothing does."""
        limit = SHARED_LIMIT[self.capability]
        found = {
            f"{self.spilled} bytes are spilled": self.spilled > 0,
            f"{self.registers} registers, {MOST_REGISTERS} is the limit": self.registers > MOST_REGISTERS,
            f"{self.shared} bytes of shared memory, {limit} is the limit": self.shared > limit,
            f"no matrix instruction ({', '.join(MATRIX[self.capability])})": not self.matrix,
            f"no asynchronous copy ({', '.join(ASYNC_COPY)})": not self.copies,
        }
        return [text for text, wrong in found.items() if wrong]


def meta_problem(
    heads: int, key_heads: int, size: int, radius: int = 2, dtype: torch.dtype = torch.bfloat16, causal: bool = True
) -> Problem:
    """An image of 64 x 64 tokens behind 35 text tokens, without memory."""

    def stream(tokens: int, heads: int) -> Tensor:
        return torch.empty(1, tokens, heads, size, dtype=dtype, device="meta").transpose(1, 2)

    q, k, text = stream(4096, heads), stream(4096, key_heads), stream(48, key_heads)
    return Problem(q, k, k, text, text, ((0, 0, 64, 64, 0, 35),), radius, "chebyshev", causal, size**-0.5)


def launches(problem: Problem, capability: int) -> dict[str, Launch]:
    """All launches of a problem on a GPU of this compute capability (times ten), by the kernel's name."""
    q, k = problem.q, problem.k
    o = torch.empty_like(q.transpose(1, 2))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    backward = backward_configs(capability, problem.packed, q.element_size())
    found = (
        forward_launch(problem, o, lse, forward_config(problem.packed, problem.radius, q.element_size())),
        dq_launch(problem, o, o, lse, lse, q, backward.dq),
        dkv_launch(problem, o, lse, lse, k, k, backward.dkv),
        text_launch(problem, o, lse, lse, 256, backward.text)[0],
    )
    return {launch.kernel.__name__: launch for launch in found}


def compiled(launch: Launch, capability: int, **options: Any) -> Any:
    """What Triton makes of a launch for a GPU of this compute capability (times ten)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    return triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**launch.options, **options},
    )


def resources(launch: Launch, capability: int) -> Resources:
    """Compile a launch for a GPU of this compute capability (times ten) and read what it takes."""
    made = compiled(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage, code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)
    counted = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    return Resources(
        capability=capability,
        registers=counted["REG"],
        spilled=counted["STACK"] + counted["LOCAL"],
        shared=made.metadata.shared,
        matrix=_count(opcodes, MATRIX[capability]),
        copies=_count(opcodes, ASYNC_COPY),
    )


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments of a launch's arguments, as a call of the kernel would find them."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[(index,)] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        special = not launch.kernel.params[index].do_not_specialize
        parts = {(index, at): part for at, part in enumerate(value)} if isinstance(value, tuple) else {(index,): value}
        types = ["constexpr" if special and _is_one(part) else _type(part) for part in parts.values()]
        signature[name] = type(value)(*types) if isinstance(value, tuple) else types[0]
        constants |= {at: 1 for at, part in parts.items() if special and _is_one(part)}
        attributes |= {at: [["tt.divisibility", 16]] for at, part in parts.items() if special and _aligned(part)}
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_one(value: Any) -> bool:
    """Whether a call would make the argument a constant."""
    return isinstance(value, int) and value == 1


def _aligned(value: Any) -> bool:
    """Whether a call would find the argument a multiple of 16; memory comes from PyTorch's allocators, which align."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _count(opcodes: list[str], wanted: tuple[str, ...]) -> dict[str, int]:
    return {name: opcodes.count(name) for name in wanted if name in opcodes}
