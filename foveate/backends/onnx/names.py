"""What the inputs and outputs of exported graphs are called: the field's names where there are any.

prefill   visual_embeds, text_embeds, ...     -> logits, keep.{layer}, present.{i}.key, visual.{i}.key, ...
decode    inputs_embeds, past_key_values.{i}.key, visual.{i}.key, ...   -> logits, new.{i}.key, ...

Where a layer holds the prompt's best tokens as one block, a prefill returns held.{i}.key, held.{i}.value and
held.{i}.places, and with steps that evict held.{i}.sums and held.{i}.budget; such a step returns scores.{i}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from foveate.ir.program import outputs
from foveate.ir.text import size_text
from foveate.manifest import GRAPHS

FILES = {name: file for name, file in GRAPHS.items() if name != "embed"}
"""Graph of a program -> its file in a package."""

_INPUTS = {
    "prefill": {"visual": "visual_embeds", "text": "text_embeds"},
    "decode": {"text": "inputs_embeds", "text_position_ids": "position_ids", "text_order": "order"},
}
_CACHED = re.compile(r"(past|visual|held)_([kv])_(\d+)")
_PARTS = {"k": "key", "v": "value"}
_GROUPS = {"past": "past_key_values", "visual": "visual", "held": "held"}
_STATE = ("places", "sums", "budget")
"""What belongs to a held block, as `VisualTextCache.fill` takes it; places alone where steps evict nothing."""


def input_name(graph: str, name: str) -> str:
    """The name in a package of a program graph's input."""
    if found := _CACHED.fullmatch(name):
        group, part, layer = found.groups()
        return f"{_GROUPS[group]}.{layer}.{_PARTS[part]}"
    if graph == "decode" and name.startswith("kept_"):
        return f"keep.{name.removeprefix('kept_')}"
    return _INPUTS.get(graph, {}).get(name, name)


def named_outputs(graph: str, of: fx.Graph) -> dict[str, fx.Node]:
    """A graph's outputs by their names in a package."""
    return dict(_flat(graph, outputs(of)))


def _flat(graph: str, returned: dict[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    for name, value in returned.items():
        if name == "kv":
            yield from _cache(graph, value, set(returned.get("held", {})))
        elif name == "held":
            for layer, state in value.items():
                yield from zip((f"held.{layer}.{part}" for part in _STATE), state, strict=False)
        elif name == "kept":
            yield from ((f"keep.{layer}", node) for layer, node in value.items())
        elif name == "out":
            yield "image_features", value
        elif isinstance(value, fx.Node):
            yield name, value
        elif value:
            yield from ((f"{name}.{key}", node) for key, node in _leaves(value))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, fx.Node]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(child, fx.Node):
            yield name, child
        elif child is not None:
            yield from _leaves(child, name)


def _cache(graph: str, kv: list[Any], held: set[str]) -> Iterator[tuple[str, fx.Node]]:
    """held: the layers whose visual and text tokens are one block."""
    own = "new" if graph == "decode" else "present"
    for layer, pairs in enumerate(kv):
        first = "held" if str(layer) in held else "visual"
        for place, node in enumerate(pairs):
            if node is not None:
                yield f"{first if place < 2 else own}.{layer}.{'key' if place % 2 == 0 else 'value'}", node


def rebuilt(graph: str, of: fx.Graph, found: dict[str, Any]) -> dict[str, Any]:
    """What a program's graph returns, from values by their names in a package."""
    by_node = {node: found[name] for name, node in named_outputs(graph, of).items()}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(child) for name, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [fill(child) for child in value]
        return by_node[value] if isinstance(value, fx.Node) else value

    result: dict[str, Any] = fill(outputs(of))
    return result


def named_values(graph: str, of: fx.Graph, returned: dict[str, Any]) -> dict[str, Any]:
    """What a program's graph returned, by the names in a package; the reverse of `rebuilt`."""
    by_node: dict[fx.Node, Any] = {}

    def pair(node: Any, value: Any) -> None:
        if isinstance(node, fx.Node):
            by_node[node] = value
        elif isinstance(node, dict):
            for name, child in node.items():
                pair(child, value[name])
        elif isinstance(node, (list, tuple)):
            for child, part in zip(node, value, strict=True):
                pair(child, part)

    pair(outputs(of), returned)
    return {label: by_node[node] for label, node in named_outputs(graph, of).items()}


def axis_name(size: Any, names: Mapping[Any, str]) -> str:
    """A symbolic size by the program's names, as every tool takes it: `floor_0_5_visual_tokens`."""
    return re.sub(r"\W+", "_", size_text(size, names)).strip("_")
