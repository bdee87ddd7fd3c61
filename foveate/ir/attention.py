"""An attention node taken apart by name, so that no one counts arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import fx

from foveate import ops
from foveate.ir.program import args_of, info


@dataclass(frozen=True)
class Attention:
    """Arguments of a `foveate::attention` node; see `foveate.ops.attention` for what they mean."""

    q: list[fx.Node]
    k: list[fx.Node]
    v: list[fx.Node]
    q_order: list[fx.Node]
    k_order: list[fx.Node]
    prefix: Any
    layout: str
    scale: float

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """The arguments of a node."""
        return cls(*args_of(node))

    @property
    def keys(self) -> str:
        """Key streams, one letter each, such as `vt`."""
        return self.layout.partition(":")[2]

    @property
    def args(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def without_visual(self) -> Attention:
        """The same queries, blind: visual keys are left out."""
        kept = [i for i, stream in enumerate(self.keys) if stream != "v"]
        k, v, k_order = ([xs[i] for i in kept] for xs in (self.k, self.v, self.k_order))
        return replace(self, k=k, v=v, k_order=k_order, layout=self.layout.replace("v", ""))


def attentions(graph: fx.Graph, layer: int | None = None, stream: str | None = None) -> list[fx.Node]:
    """Attention nodes of a layer and query stream (of all, where not given), in graph order."""
    return [
        n
        for n in graph.nodes
        if n.target == ops.attention and layer in (None, info(n).layer) and stream in (None, info(n).stream)
    ]


def looks_at_visual(node: fx.Node) -> bool:
    """Whether an attention node has visual keys."""
    return "v" in Attention.of(node).keys
