"""Attention nodes taken apart by name, so that no one counts arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import fx

from foveate import ops
from foveate.errors import PassError
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
    reach: list[fx.Node] | None = None
    window: int = 0

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """The arguments of a node."""
        return cls(*args_of(node))

    @property
    def queries(self) -> list[fx.Node]:
        """The query streams."""
        return self.q

    @property
    def keys(self) -> str:
        """Key streams, one letter each, such as `vt`."""
        return self.layout.partition(":")[2]

    @property
    def args(self) -> tuple[Any, ...]:
        """As the op takes them; what says nothing is left out."""
        given = tuple(getattr(self, f.name) for f in fields(self))
        return given if self.window else given[:-1] if self.reach is not None else given[:-2]

    @property
    def plain(self) -> bool:
        """Whether a query sees all keys before it, and no others."""
        return self.reach is None and not self.window

    def checked(self, by: str, node: fx.Node) -> Attention:
        """Itself, if it is plain; PassError that names the pass, which counts on that, and the layer."""
        if not self.plain:
            sees = f"only the last {self.window} tokens" if self.window else "every token of its own image"
            raise PassError(f"{by}: in layer {info(node).layer} a token sees {sees}, which {by} does not know")
        return self

    def without_window(self, by: str, node: fx.Node) -> Attention:
        """Itself, if text sees all before it; otherwise PassError that names the pass, and layers where it does."""
        if self.window:
            layers = sorted({info(n).layer for n in attentions(node.graph) if not getattr(taken_apart(n), "window", 0)})
            raise PassError(
                f"{by}: in layer {info(node).layer} a token sees only the last {self.window} tokens, so its attention "
                f"does not rank an image; text sees whole images in the layers {', '.join(map(str, layers)) or 'none'}"
            )
        return self

    @property
    def received(self) -> tuple[Any, ...]:
        """Arguments of `foveate::received_attention`: what visual keys receive from visual queries, or from text."""
        return (self.q[0], self.k, self.q_order[0], self.k_order, self.layout.startswith("t"), self.scale)

    def without_visual(self) -> Attention:
        """The same queries, blind: visual keys are left out."""
        kept = [i for i, stream in enumerate(self.keys) if stream != "v"]
        k, v, k_order = ([xs[i] for i in kept] for xs in (self.k, self.v, self.k_order))
        return replace(self, k=k, v=v, k_order=k_order, layout=self.layout.replace("v", ""))


@dataclass(frozen=True)
class Neighbors:
    """Arguments of a `foveate::neighbor_attention` node; see `foveate.ops.neighbor_attention` for what they mean."""

    q: fx.Node
    k: list[fx.Node]
    v: list[fx.Node]
    q_order: fx.Node
    k_order: list[fx.Node]
    coords: fx.Node
    grids: fx.Node
    radius: int
    metric: str
    causal: bool
    scale: float

    @classmethod
    def of(cls, node: fx.Node) -> Neighbors:
        """The arguments of a node."""
        return cls(*args_of(node))

    @property
    def queries(self) -> list[fx.Node]:
        """The query stream, which is the visual one."""
        return [self.q]

    @property
    def keys(self) -> str:
        """Key streams, one letter each: `v`, or `vt`."""
        return "vt"[: len(self.k)]

    @property
    def args(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def received(self) -> tuple[Any, ...]:
        """Arguments of `foveate::received_attention`: what visual keys receive from visual queries."""
        window = self.coords, self.radius, self.metric, self.causal
        return (self.q, self.k, self.q_order, self.k_order, False, self.scale, *window)


VIEWS_OF: dict[Any, type[Attention | Neighbors]] = {
    ops.attention: Attention,
    ops.neighbor_attention: Neighbors,
}
"""Each attention op of a decoder, and what takes its nodes apart."""


def taken_apart(node: fx.Node) -> Attention | Neighbors:
    """The arguments of an attention node of either kind."""
    return VIEWS_OF[node.target].of(node)


def attentions(graph: fx.Graph, layer: int | None = None, stream: str | None = None) -> list[fx.Node]:
    """Attention nodes of a layer and query stream (of all, where not given), in graph order.

    Those of text are all `foveate::attention`; visual tokens may attend to their neighbours instead.
    """
    return [
        n
        for n in graph.nodes
        if n.target in VIEWS_OF and layer in (None, info(n).layer) and stream in (None, info(n).stream)
    ]


def looks_at_visual(node: fx.Node) -> bool:
    """Whether an attention node has visual keys."""
    return "v" in taken_apart(node).keys
