"""Optimisation profiles: the sizes an engine is built for, from what is said of each symbolic dimension.

    ranges = {"batch": (1, 1, 8), "visual_tokens": (0, 576, 2304), "text_tokens": (1, 64, 4096)}
    profiles({"decoder_prefill": model}, ranges)

gives each input of each graph its smallest, most likely and largest shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foveate.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import onnx

Range = tuple[int, int, int]
"""Least, likeliest and largest size of a dimension."""

Shape = tuple[int, ...]
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Shapes:
    """One input's shape at the least, the likeliest and the largest sizes."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Mapping[str, Shapes]
"""A graph's inputs that have symbolic dimensions, with their shapes."""


def profiles(models: Mapping[str, onnx.ModelProto], ranges: Mapping[str, Range]) -> dict[str, Profile]:
    """A profile for each graph.

    Raises InputError for a range that is none, a dimension without one, and a name that no graph has.
    """
    dims = {name: symbolic_dims(model, name) for name, model in models.items()}
    there = sorted({d for inputs in dims.values() for shape in inputs.values() for d in shape if isinstance(d, str)})
    listed = ", ".join(there) or "none"
    for name, sizes in ranges.items():
        if name not in there:
            raise InputError(f"no graph has a dimension {name!r}; there are: {listed}")
        _check(name, sizes)
    missing = [name for name in there if name not in ranges]
    if missing:
        raise InputError(f"sizes are missing for {', '.join(missing)}; the graphs have the dimensions {listed}")
    return {graph: {name: _shapes(shape, ranges) for name, shape in inputs.items()} for graph, inputs in dims.items()}


def symbolic_dims(model: onnx.ModelProto, name: str) -> dict[str, tuple[int | str, ...]]:
    """The inputs of a graph that have symbolic dimensions, and their shapes; ArtifactError where one has no name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for info in model.graph.input:
        dims = info.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
        if info.name in weights or all(isinstance(d, int) for d in shape):
            continue
        if "" in shape:
            raise ArtifactError(f"{name}: axis {shape.index('')} of the input {info.name} has neither size nor name")
        found[info.name] = shape
    return found


def to_json(made: Mapping[str, Profile], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """What `profiles.json` holds."""
    graphs = {graph: {name: asdict(shapes) for name, shapes in profile.items()} for graph, profile in made.items()}
    return {"ranges": {name: list(sizes) for name, sizes in ranges.items()}, "graphs": graphs}


def _check(name: str, sizes: Range) -> None:
    """Whoever gives ranges may have read them from a file, so that they can be anything."""
    whole = isinstance(sizes, (tuple, list)) and all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    if not whole or len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2] <= LARGEST or sizes[2] == 0:
        raise InputError(f"{name} must have three sizes, least <= likeliest <= largest, not {sizes!r}")


def _shapes(shape: tuple[int | str, ...], ranges: Mapping[str, Range]) -> Shapes:
    least, likeliest, largest = (tuple(d if isinstance(d, int) else ranges[d][i] for d in shape) for i in range(3))
    return Shapes(least, likeliest, largest)
