"""Visual tokens use some attention heads only; text uses all of them.

    before                                           after, kept heads first (K of H)
    q.visual, k.visual, v.visual   H heads           K heads: slices of the projections
    a.visual = attention(q.visual; both)             the same with K heads; o.visual reads K heads
    a.text   = attention(q.text; both)               [attention(q.text[:K]; both), attention(q.text[K:]; k.text)]

Heads are reordered so that the kept ones stand in front, which does not change the function. In a dropped head text
attends to text alone, with a softmax over text keys ("renormalised"); a key head of a group goes only when all its
query heads go. An approximation: YOPO (arXiv 2410.06169, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.heads import HeadPlan, expand_order, heads_for, plan_heads
from foveate.ir.program import info, outputs
from foveate.ir.rewriter import Rewriter, nodes_of
from foveate.ir.weights import permute, slice_weight, weight_name
from foveate.passes.base import Pass, Skipped, keys_of, text_attention, whole
from foveate.passes.head_scores import weight_norm_scores

aten = torch.ops.aten


@dataclass(frozen=True)
class DropVisualHeads(Pass):
    """In layers from `from_layer` on, visual tokens use `keep` query heads, or those that `mask` marks True.

    keep: 0 to the number of heads, the heads with the largest `scores` (ties: lower index). mask: [layers][heads].
    scores: [layers][heads], or `weight-norm`: the Frobenius norm of each head's value-output product.
    Layers before `from_layer` keep every head; YOPO exempts the first two.
    """

    name: ClassVar[str] = "drop-visual-heads"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.3"

    keep: int | None = None
    mask: Any = None
    from_layer: int = 2
    scores: Any = "weight-norm"

    def __post_init__(self) -> None:
        for name in ("mask", "scores"):
            object.__setattr__(self, name, _nested(self.name, name, getattr(self, name)))
        self.require((self.keep is None) != (self.mask is None), "keep", "a number of heads, or give `mask` instead")
        self.require(self.keep is None or (whole(self.keep) and self.keep >= 0), "keep", "0 or more heads")
        self.require(whole(self.from_layer) and self.from_layer >= 0, "from_layer", "a layer number, 0 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        self.require_layer(edit.program, "from_layer")
        done: dict[int, int] = {}
        for layer, keep in enumerate(self._kept(edit)):
            if layer < self.from_layer:
                if self.mask is not None and not all(keep):
                    yield f"layer {layer} keeps every head, whatever the mask says: from_layer={self.from_layer}"
            elif not all(keep) and text_attention(edit.graph, layer):
                plan = plan_heads(keep, edit.program.info.kv_heads)
                done[layer] = plan.kept
                _LayerEdit(edit, layer, plan, self.name).run()
        if not done:
            raise Skipped(f"no visible layer from {self.from_layer} on has a head to drop")
        edit.refresh()
        edit.sweep()
        mean = sum(done.values()) / len(done)
        yield (
            f"layers {min(done)} to {max(done)}: {edit.program.info.heads} -> {mean:g} heads for visual tokens"
            f"{'' if len(set(done.values())) == 1 else ' on average'}"
        )

    def _kept(self, edit: Rewriter) -> list[list[bool]]:
        model = edit.program.info
        if self.mask is not None:
            _check_shape(self.name, "mask", self.mask, model.layers, model.heads)
            return [[bool(x) for x in row] for row in self.mask]
        assert self.keep is not None  # __post_init__ saw to it
        if self.keep > model.heads:
            raise PassError(f"{self.name}: keep={self.keep}, but the model has {model.heads} heads")
        if self.scores == "weight-norm":
            scores = weight_norm_scores(edit.program)
        else:
            _check_shape(self.name, "scores", self.scores, model.layers, model.heads)
            scores = [list(map(float, row)) for row in self.scores]
        best = [sorted(range(model.heads), key=lambda h, row=row: (-row[h], h))[: self.keep] for row in scores]
        return [[h in chosen for h in range(model.heads)] for chosen in best]


class _LayerEdit:
    """One layer's rewrite; the steps are in `run`."""

    def __init__(self, edit: Rewriter, layer: int, plan: HeadPlan, name: str) -> None:
        self.edit, self.layer, self.plan, self.name = edit, layer, plan, name
        self.roles = edit.program.info.roles

    def run(self) -> None:
        text = text_attention(self.edit.graph, self.layer)
        readers = [u for u in text[0].args[1][0].users if u.target == ops.attention_row]  # type: ignore[union-attr,index]  # keys are nodes
        if len(text) != 1 or int(text[0].args[0][0].meta["val"].shape[1]) != self.edit.program.info.heads:  # type: ignore[union-attr,index]  # queries are nodes
            raise PassError(f"{self.name}: layer {self.layer} already has heads dropped")
        if readers and not self.plan.kept:
            raise PassError(f"{self.name}: a selection reads layer {self.layer}'s attention; keep at least one head there")
        self._order_weights()
        if self.plan.kept:
            self._slice_projections()
            for node in nodes_of(self.edit.graph, layer=self.layer, stream="visual", op=ops.attention):
                self._kept_heads(node, node)
            for node in readers:
                self._kept_heads(node, node)
        else:
            self._remove_visual()
        self._split_text(text[0])
        self.edit.refresh(self.layer)

    def _linears(self, part: str, stream: Any = "visual") -> list[fx.Node]:
        return nodes_of(
            self.edit.graph, stream=stream, role=self.roles[part], layer=self.layer, op=aten.linear.default
        )

    def _order_weights(self) -> None:
        size = self.edit.program.info.head_dim
        for part, order, dim in (
            ("q", self.plan.order, 0),
            ("k", self.plan.kv_order, 0),
            ("v", self.plan.kv_order, 0),
            ("o", self.plan.order, 1),
        ):
            if list(order) != sorted(order):
                permute(self.edit.program, weight_name(self._linears(part, "text")[0]), expand_order(order, size), dim)

    def _slice_projections(self) -> None:
        size = self.edit.program.info.head_dim
        for part, heads, dim in (("q", self.plan.kept, 0), ("k", self.plan.kv, 0), ("v", self.plan.kv, 0), ("o", self.plan.kept, 1)):
            for linear in self._linears(part):
                slice_weight(self.edit, linear, dim, heads * size)
                for user in list(linear.users) if dim == 0 else []:
                    if user.target != aten.unflatten.int:
                        raise PassError(f"{self.name}: layer {self.layer}: {user.name} reads all heads of {part} at once")
                    user.args = (*user.args[:2], [heads, size])
        self.edit.refresh(self.layer)

    def _kept_heads(self, node: fx.Node, before: fx.Node) -> None:
        """Attention, or an attention row, of the kept heads alone."""
        about = info(node).with_(by=self.name, origin=(node.name,))
        lists = (1, 2) if node.target == ops.attention else (1,)
        args = list(node.args)
        with self.edit.before(before):
            if node.target == ops.attention_row:
                args[0] = self.edit.call(aten.slice.Tensor, args[0], 1, 0, self.plan.kept, about=about)
            for place in lists:
                args[place] = [heads_for(self.edit, x, self.plan.kept_kv, about) for x in args[place]]  # type: ignore[union-attr]  # lists by the op's schema
        self.edit.set_args(node, tuple(args))

    def _split_text(self, node: fx.Node) -> None:
        """Kept heads see both streams, dropped heads see text alone."""
        (q,), k, v, q_order, k_order, prefix, layout, scale = node.args  # type: ignore[misc]  # split-form attention
        about = info(node).with_(by=self.name, origin=(node.name,))
        edit, plan = self.edit, self.plan
        text = keys_of(node).index("t")
        with edit.before(node):
            parts = []
            if plan.kept:
                query = edit.call(aten.slice.Tensor, q, 1, 0, plan.kept, about=about)
                keys, values = ([heads_for(edit, x, plan.kept_kv, about) for x in xs] for xs in (k, v))  # type: ignore[union-attr]  # lists of nodes
                parts.append(edit.call(ops.attention, [query], keys, values, q_order, k_order, prefix, layout, scale, about=about))
                q = edit.call(aten.slice.Tensor, q, 1, plan.kept, len(plan.order), about=about)
            key, value = (heads_for(edit, xs[text], plan.dropped_kv, about) for xs in (k, v))  # type: ignore[index]  # lists of nodes
            orders = [k_order[text]]  # type: ignore[index]  # list of nodes
            parts.append(edit.call(ops.attention, [q], [key], [value], q_order, orders, prefix, "t:t", scale, about=about))
            whole_ = parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, 2, about=about)
        edit.replace(node, whole_)

    def _remove_visual(self) -> None:
        """No head is left: the residual stream passes the attention by, and the layer keeps no visual keys."""
        for linear in self._linears("o"):
            for add in list(linear.users):
                if add.target != aten.add.Tensor:
                    raise PassError(f"{self.name}: layer {self.layer}: {add.name} stands between attention and residual")
                self.edit.replace(add, next(x for x in add.args[:2] if x is not linear))  # type: ignore[arg-type]  # an add of two nodes
        result = dict(outputs(self.edit.graph))
        entries = list(result["kv"])
        entries[self.layer] = [None, None, *entries[self.layer][2:]]
        self.edit.output({**result, "kv": entries})


def _nested(name: str, option: str, value: Any) -> Any:
    """Tensors, arrays and lists as nested tuples; a string or None as it is."""
    if value is None or isinstance(value, str):
        if option == "scores" and value != "weight-norm":
            raise PassError(f"{name}: scores={value!r}; allowed: weight-norm, or numbers [layers][heads]")
        return value
    rows = value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(tuple(row) for row in rows)
    except TypeError:
        raise PassError(f"{name}: {option} must be [layers][heads], one row a layer") from None


def _check_shape(name: str, option: str, rows: Any, layers: int, heads: int) -> None:
    widths = {len(row) for row in rows}
    if len(rows) != layers or widths != {heads}:
        raise PassError(
            f"{name}: {option} is {len(rows)} rows of {sorted(widths)} entries; the model has {layers} layers of {heads} heads"
        )
