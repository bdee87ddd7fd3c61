"""Selecting and merging visual tokens in the vision graph, before the decoder sees them.

    before                                   after
    tower -> features [I, N, C]              tower -> features [I, N, C] -> compacted [I, k, C]
    projector -> out [I, N, D]               projector -> out [I, k, D]; source [I, k]

`source` is the place on the image's grid that each token stands for. With `count` [I], an image has only so many of
the k tokens; that is settled before the decoder runs.

Where a token is made of a square of patches (pixel unshuffling, pooling), what the tower knows of patches is summed, or
averaged, over the square; tokens are then what the projector's first product with a weight reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import NodeInfo, args_of, info, outputs
from foveate.ir.rewriter import Rewriter, shape
from foveate.ir.tail import END

aten = torch.ops.aten

IN_THE_DECODER = "; select in the decoder, with fastv or dart for instance"

REFUSED = {
    "packed": "images stand in one sequence there, and are chosen from, not merged; take divprune, say",
    "shrunk": f"it has no CLS token, and shrinks images and frames behind the tower{IN_THE_DECODER}",
    "unknown": f"it is not known how that makes its tokens{IN_THE_DECODER}",
}
"""Kind of tower -> why it is not one of those that selections know, and what there is instead."""


class Tower:
    """The parts of a vision graph that selections look at, and what they do to it.

    whole: whether it still gives all of an image's tokens. merged_by: the pass that merges tokens inside the tower, if
    one does. projected: whether tokens are selected behind the projector, not before it. side: of the square of patches
    that a token is made of. has_cls: whether a CLS token stands before the patches. New nodes belong in front of `end`.
    Raises PassError for a family whose tower is not known, and where an image's number of tokens already depends on it.
    """

    def __init__(self, edit: Rewriter, name: str, projected: bool = False) -> None:
        about = edit.program.info
        if why := REFUSED.get(about.tower):
            raise PassError(f"{name}: visual tokens cannot be selected so in the vision tower of {about.family}: {why}")
        if "vision_rest" in edit.program.graphs:
            cut_by = info(outputs(edit.graph)["count"]).by
            raise PassError(
                f"{name}: {cut_by} leaves as many tokens inside the vision tower as the image says, and {name} cannot "
                "select from those; use one of the two"
            )
        if "count" in outputs(edit.graph):
            raise PassError(f"{name}: an image's number of tokens already depends on the image; put {name} before that")
        self.edit = edit
        self.name = name
        self.attentions = [n for n in edit.graph.nodes if n.target == ops.encoder_attention]
        self.layers = info(self.attentions[-1]).layer + 1 if self.attentions else 0
        self.end = edit.graph.output_node() if projected else next(n for n in edit.graph.nodes if self._projects(n))
        if projected and about.tower == "interleaved":
            # The projector's tokens are given one more, the newline.
            self.end = outputs(edit.graph)["out"]
        self.side, self.has_cls = 1, True
        if about.tower == "squares":
            length = int(shape(args_of(self.attentions[0])[1])[2])
            self.side = math.isqrt(length // about.tokens_per_image)
            self.has_cls = length > about.tokens_per_image * self.side**2
        self.whole = "source" not in outputs(edit.graph)
        self.merged_by = next((info(n).by for n in edit.graph.nodes if n.target == ops.join_tokens), "")

    def _projects(self, node: fx.Node) -> bool:
        """Whether a node behind the layers multiplies tokens by a weight, and no pass has put it there to select."""
        if node.target not in (aten.linear.default, aten.matmul.default) or info(node).layer < self.layers:
            return False
        return args_of(node)[1].op == "get_attr" and info(node).role != "select"

    @property
    def tokens(self) -> fx.Node:
        """What is selected from: [I, n, C], n of the image's N tokens."""
        if self.end.op == "output":
            node: fx.Node = outputs(self.edit.graph)["out"]
        else:
            node = args_of(self.end)[0]
        return node[0] if isinstance(node, (list, tuple)) else node

    def about(self, role: str = "select") -> NodeInfo:
        """Why a node that selects is there."""
        return NodeInfo(self.layers, role, "none", self.name)

    def call(self, op: object, *args: object) -> fx.Node:
        """Insert a call for this pass."""
        return self.edit.call(op, *args, about=self.about())

    def check_whole(self) -> None:
        """Raise PassError where tokens were selected or merged before."""
        if self.merged_by:
            raise PassError(
                f"{self.name}: {self.merged_by} merges tokens inside the vision tower, and {self.name} takes all that "
                "an image has; use one of the two"
            )
        if not self.whole:
            raise PassError(f"{self.name}: the vision tower already selects visual tokens; put {self.name} before that")

    def check_moves(self) -> None:
        """Raise PassError where tokens stand among newlines, so that none may take another's place."""
        if self.edit.program.info.tower == "interleaved":
            raise PassError(
                f"{self.name}: in a {self.edit.program.info.family} rows of several tiles stand side by side, with "
                f"newlines between, and what {self.name} makes of a tile has no place there; fastervlm, vispruner and "
                "divprune leave tokens where they are"
            )

    def check_single(self) -> None:
        """Raise PassError where what works inside the tower cannot.

        A token that is a square of patches would be torn apart, and a CLS token is what it leaves in front.
        """
        self.check_moves()
        if self.side > 1:
            raise PassError(
                f"{self.name}: in the tower of {self.edit.program.info.family} a token is {self.side} x {self.side} "
                f"patches, and {self.name} works on single ones; visionzip, prumerge and divprune work on tokens"
            )
        if not self.has_cls:
            raise PassError(
                f"{self.name}: the tower of this {self.edit.program.info.family} has no CLS token, which {self.name} "
                "needs; visionzip, prumerge and divprune do without"
            )

    @property
    def cls_kept(self) -> bool:
        """Whether the CLS token could be a visual token: it is there, and not a part of one."""
        return self.has_cls and self.side == 1

    @property
    def cls(self) -> fx.Node | None:
        """The CLS token's features [I, 1, C], where it could be a token of its own."""
        if not self.cls_kept:
            return None
        whole: fx.Node = args_of(self.tokens)[0]
        return self.call(aten.slice.Tensor, whole, 1, 0, 1)

    def heads(self) -> tuple[fx.Node, fx.Node, float]:
        """Queries and keys [I, H, 1 + N, e] of the last layer that the features come from, and the scale."""
        self.check_attends()
        if self.merged_by:
            raise PassError(
                f"{self.name}: {self.merged_by} merges tokens inside the vision tower, behind the attention that "
                f"{self.name} looks at; divprune selects from what is merged"
            )
        query, key, _, scale = args_of(self.attentions[-1])[:4]
        return query, key, scale

    def check_attends(self) -> None:
        """Raise PassError where the features come from no layer."""
        if not self.attentions:
            raise PassError(f"{self.name}: the features come from no layer of the tower, so there is no attention")

    def next_layer(self) -> tuple[fx.Node, fx.Node, float]:
        """Queries and keys [I, 1, n, C] in the layer behind the features, heads taken together, and the scale.

        Queries are CLS alone where there is one. A tower that ends with the features gives those of its last layer.
        """
        query, key, _ = self.heads()
        if self.edit.program.info.tower == "squares":
            flat = [
                self.call(aten.flatten.using_ints, self.call(aten.transpose.int, x, 1, 2), 2, 3) for x in (query, key)
            ]
            return *(self.call(aten.unsqueeze.default, x, 1) for x in flat), int(shape(flat[0])[2]) ** -0.5
        while query.target != aten.linear.default:
            query = args_of(query)[0]
        path = str(args_of(query)[1].target).removesuffix("self_attn.q_proj.weight")
        behind = path.replace(f"layers.{self.layers - 1}.", f"layers.{self.layers}.")
        hidden: fx.Node = args_of(self.tokens)[0]
        if f"{behind}self_attn.q_proj.weight" not in self.edit.program.weights.names:
            behind, hidden = path, args_of(args_of(query)[0])[0]
        size = int(shape(hidden)[2])
        norm = [self.edit.weight(f"{behind}layer_norm1.{part}") for part in ("weight", "bias")]
        eps = self.edit.program.info.config["vision_config"]["layer_norm_eps"]
        hidden = self.call(aten.layer_norm.default, hidden, [size], *norm, eps, False)
        cls = self.call(aten.slice.Tensor, hidden, 1, 0, 1)
        found = []
        for x, name in ((cls, "q_proj"), (hidden, "k_proj")):
            linear = [self.edit.weight(f"{behind}self_attn.{name}.{part}") for part in ("weight", "bias")]
            found.append(self.call(aten.unsqueeze.default, self.call(aten.linear.default, x, *linear), 1))
        return found[0], found[1], size**-0.5

    def row(self, query: fx.Node, key: fx.Node, scale: float) -> fx.Node:
        """How much attention each token gets: fp32 [I, N], of queries and keys [I, H, n, e].

        What the CLS token pays, summed over heads: only that one row is computed. In a tower without CLS, what all
        patches pay, their mean (VisionZip, arXiv 2412.04467, section 3.2, and its code for such towers).
        """
        row = self._cls_row(query, key, scale) if self.has_cls else self.call(ops.column_means, query, key, scale)
        return self.by_token(row, aten.sum.dim_IntList)

    def metric(self, key: fx.Node) -> fx.Node:
        """Keys [I, n, e] of patches, CLS before them if there is one, as keys of tokens: [I, N, e]."""
        patches = self.call(aten.slice.Tensor, key, 1, 1, END) if self.has_cls else key
        return self.by_token(patches, aten.mean.dim)

    def by_token(self, x: fx.Node, gather: object) -> fx.Node:
        """Values of patches [I, n, ...] as values of tokens [I, N, ...]: gathered over each token's square."""
        if self.side == 1:
            return x
        rows, columns = self.edit.program.info.grid
        squares = self.call(aten.unflatten.int, x, 1, [rows, self.side, columns, self.side])
        return self.call(aten.flatten.using_ints, self.call(gather, squares, [2, 4]), 1, 2)

    def _cls_row(self, query: fx.Node, key: fx.Node, scale: float) -> fx.Node:
        cls = self.call(aten.slice.Tensor, query, 2, 0, 1)
        logits = self.call(aten.mul.Scalar, self.call(aten.matmul.default, cls, self._turned(key)), scale)
        row = self.call(aten.softmax.int, self.call(aten.to.dtype, logits, torch.float32), -1)
        return self.call(aten.slice.Tensor, self.call(aten.sum.dim_IntList, row, [1, 2]), 1, 1, END)

    def _turned(self, key: fx.Node) -> fx.Node:
        return self.call(aten.transpose.int, key, 2, 3)

    def merge(
        self, weights: fx.Node, source: fx.Node, count: fx.Node | None = None, first: fx.Node | None = None
    ) -> None:
        """Weighted sums take the tokens' place: weights [I, k, n]; first: a token [I, 1, C] that goes before them."""
        like: Tensor = self.tokens.meta["val"]
        merged = self.call(aten.matmul.default, self.call(aten.to.dtype, weights, like.dtype), self.tokens)
        if first is not None:
            merged = self.call(aten.cat.default, [first, merged], 1)
            nowhere = self.call(aten.add.Scalar, self.call(ops.places, first), -1)
            source = self.call(aten.cat.default, [nowhere, source], 1)
        self.become(merged, source, count)

    def places(self) -> fx.Node:
        """Which place on the grid each token of `tokens` stands for: int64 [I, n]."""
        found = outputs(self.edit.graph).get("source")
        return found if found is not None else self.call(ops.places, self.tokens)

    def left(self, scores: fx.Node) -> fx.Node:
        """Scores of all tokens that the tower gives as scores of those that are left.

        PassError where one of them has no score: VisionZip's CLS token, and what is chosen of a resized image.
        """
        if self.whole:
            return scores
        calls = {n.target for n in self.edit.graph.nodes}
        if self.cls_kept and ops.visionzip in calls:
            raise PassError(
                f"{self.name}: visionzip keeps the CLS token, which {self.name} has no score for; use one of the two, "
                "or divprune behind visionzip"
            )
        if aten._upsample_bilinear2d_aa.default not in calls:
            return self.call(ops.take_tokens, scores, self.places(), 1)
        if shape(scores) != shape(self.tokens)[:2]:
            raise PassError(f"{self.name}: a resized image was selected from before; put {self.name} before that")
        return scores

    def keep(self, scores: fx.Node, keep: float) -> None:
        """The floor(keep * n) tokens with the highest scores [I, n] stay, in their old order."""
        chosen = self.call(ops.top_tokens, scores, self.places(), keep)
        index, source = (self.edit.item(chosen, place, self.about()) for place in (0, 1))
        self.become(self.call(ops.take_tokens, self.tokens, index, 1), source)

    def become(self, tokens: fx.Node, source: fx.Node, count: fx.Node | None = None) -> None:
        """What follows reads `tokens` [I, k, C] instead."""
        edit = self.edit
        edit.replace(self.tokens, tokens, where=lambda user: user is self.end)
        rest = {} if count is None else {"count": count}
        edit.output({**outputs(edit.graph), "source": source, **rest})
        edit.refresh()
        edit.sweep()
