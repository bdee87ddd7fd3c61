"""One region compiled by AOTInductor: its sizes stay free, its weights are arguments.

    region                                         compiled
    y = linear(x, w);  z = attention(y, prefix)    y = linear(x, w);  z = attention(y, len(p) - 1)

Compiled code takes and gives tensors only, so a whole number travels as the length of an empty one.
"""

from __future__ import annotations

import operator
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.backends.aoti.store import FILES
from foveate.backends.regions import Region
from foveate.errors import BackendError
from foveate.ir.program import info
from foveate.ir.symbols import Symbols
from foveate.kernels.linear import pays

aten = torch.ops.aten

OPTIONS: dict[str, Any] = {
    # As many threads as torch has when the code runs, not as it had when it was compiled.
    "cpp.dynamic_threads": True,
    # Half of the code would be tables for debuggers.
    "aot_inductor.enable_line_tables": False,
}

SMALLEST = -1
"""The smallest whole number that graphs take (`prefix` without a promise); it becomes the length 0."""

INSTEAD = "run the model with backend inductor or eager"


def as_length(number: int) -> Tensor:
    """A whole number as compiled code takes it."""
    return torch.empty(number - SMALLEST, dtype=torch.bool)


def from_length(length: Tensor) -> int:
    """The whole number again."""
    return len(length) + SMALLEST


def text_of(region: Region) -> str:
    """What a region computes, and of what; equal for regions that can share their code.

    Of sizes that are no fixed numbers it says only which are equal, so that programs do not differ by their names.
    """
    sizes: dict[Any, str] = {}
    lines = []
    for value in (node.meta["val"] for node in region.inputs):
        if isinstance(value, Tensor):
            lines.append(f"{value.dtype} {value.device} {[_named(size, sizes) for size in value.shape]}")
        else:
            lines.append(f"int {_named(value, sizes)}")
    return "\n".join([*lines, region.body])


def _named(size: Any, names: dict[Any, str]) -> str | int:
    return names.setdefault(size.node.expr, f"size{len(names)}") if isinstance(size, torch.SymInt) else int(size)


def compile_region(region: Region, folder: Path, scratch: Path) -> None:
    """Write a region's `FILES` into a folder; scratch: where torch may keep what it needs to compile others.

    Raises BackendError where there is no compiler, or where AOTInductor cannot compile an op, which it names.
    """
    import torch._inductor
    from torch._inductor.exc import InvalidCxxCompiler

    symbols = Symbols(_hints(region))
    fakes = _fakes(region, symbols)
    module = fx.GraphModule(torch.nn.Module(), _over_tensors(region, fakes), class_name="FoveateRegion")
    made = folder / "made"
    made.mkdir()
    try:
        with _torch_cache(scratch), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            torch._inductor.aot_compile(module, fakes, options={**OPTIONS, "aot_inductor.output_path": str(made)})
    except OSError:
        raise  # a full disk is not an op's fault
    except Exception as error:  # compilers fail in many ways; what matters is which op it was
        if InvalidCxxCompiler in (type(error), type(getattr(error, "inner_exception", None))):
            raise BackendError("the aoti backend needs a C++ compiler (g++ or clang++) on this machine") from None
        raise BackendError(f"AOTInductor cannot compile {_culprit(error, region)}; {INSTEAD}") from error
    if any(size.node.expr.is_number for size in symbols.sizes.values()):
        raise BackendError(f"AOTInductor compiles a layer of {len(region.graph.nodes)} nodes for one size; {INSTEAD}")
    (code,) = made.glob("*.so")
    for path, name in zip((code, code.with_suffix(".json")), FILES, strict=True):
        if path.is_file():
            path.rename(folder / name)
    shutil.rmtree(made)


def _sizes(region: Region) -> Iterator[tuple[list[Any], bool]]:
    """Of each input its sizes, and whether it is a whole number, whose size is itself."""
    for value in (node.meta["val"] for node in region.inputs):
        whole = not isinstance(value, Tensor)
        yield [value] if whole else list(value.shape), whole


def _name(size: Any, whole: bool) -> str:
    """Sizes of a region have symbols of their own: what compiling finds out about them must not reach the program.

    A whole number is one more, so it has a symbol apart from that of a size that is equal to it.
    """
    return f"{size.node.expr}{' as length' if whole else ''}"


def _hints(region: Region) -> dict[str, int]:
    symbolic = [(s, whole) for sizes, whole in _sizes(region) for s in sizes if isinstance(s, torch.SymInt)]
    return {_name(size, whole): int(size.node.hint) - SMALLEST * whole for size, whole in symbolic}


def _fakes(region: Region, symbols: Symbols) -> tuple[Tensor, ...]:
    """Values without content for a region's inputs."""
    fakes = []
    for node, (sizes, whole) in zip(region.inputs, _sizes(region), strict=True):
        shape = [_name(size, whole) if isinstance(size, torch.SymInt) else int(size) for size in sizes]
        dtype = torch.bool if whole else node.meta["val"].dtype
        fakes.append(symbols.tensor(*shape, dtype=dtype, device=torch.device("cpu")))
    return tuple(fakes)


def _over_tensors(region: Region, fakes: tuple[Tensor, ...]) -> fx.Graph:
    """A region's graph with lengths in place of whole numbers."""
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    old = list(region.graph.nodes)
    given, computed, output = old[: len(fakes)], old[len(fakes) : -1], old[-1]
    for node, fake in zip(given, fakes, strict=True):
        inside[node] = graph.placeholder(node.name)
        inside[node].meta["val"] = fake
    for node, source in zip(given, region.inputs, strict=True):
        if not isinstance(source.meta["val"], Tensor):
            length = graph.call_function(aten.sym_size.int, (inside[node], 0))
            inside[node] = graph.call_function(operator.add, (length, SMALLEST))
    for node in computed:
        inside[node] = graph.node_copy(node, inside.__getitem__)
        if node.target == aten.linear.default and pays():
            inside[node].target = ops.linear
    results = []
    for node, source in zip(output.args[0], region.results, strict=True):
        result = inside[node]
        if not isinstance(source.meta["val"], Tensor):
            length = graph.call_function(operator.sub, (result, SMALLEST))
            result = graph.call_function(aten.empty.memory_format, ([length],), {"dtype": torch.bool, "device": "cpu"})
        results.append(result)
    graph.output(tuple(results))
    return graph


@contextmanager
def _torch_cache(folder: Path) -> Iterator[None]:
    """Let torch keep headers and the like in a folder that no other user can write to."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _culprit(error: Exception, region: Region) -> str:
    """The op that a compiler's error is about and the pass that made it, or the region's, and what it said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    target = next((line.partition(":")[2].strip() for line in lines if line.startswith("target:")), None)
    said = next((line for line in lines if "error:" in line), lines[0])
    computed = [node for node in region.graph.nodes if node.op == "call_function"]
    about = [node for node in computed if target and str(node.target) == target] or computed
    passes = ", ".join(sorted({info(node).by for node in about}))
    return f"{target or f'a layer of {len(region.graph.nodes)} nodes'}, which {passes} made ({said[:200]})"
