"""Merge tokens in each layer of the vision tower, guided by a cross token that stands for the other modality.

    before                                  after
    h = x + attention(norm(x))  [I, n, C]   x has a cross token at its end: CLS at first, later what it was, without its
                                            gradient, and in each layer a learned vector added
    x' = h + mlp(norm(h))       [I, n, C]   h = the r tokens worth least, by what they receive of attention and by how
                                            much they are like one that stays, join the most alike; [I, n - r, C]

CrossGET (arXiv 2305.17455, sections 3.2 and 3.3), as its code for LLaVA does it. The vectors come out of its training,
which also gives the decoder a cross token and draws both together by a Jensen-Shannon loss: none of that is here.
Without a file of `vectors` they are zero, and the method goes as far as it does untrained. Its code leaves the cross
token among the features (`hand_on`), where it stands for no place in the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import args_of
from foveate.ir.rewriter import Rewriter, shape
from foveate.ir.tower_layers import Merger, layers_of, renew_last
from foveate.ir.vision import Tower, aten
from foveate.passes.base import Pass, Skipped
from foveate.passes.select.tome import merges
from foveate.passes.select.vision import kept_text

VECTORS = "foveate.crossget.vectors"


@dataclass(frozen=True)
class CrossGET(Pass):
    """In each layer `merge` tokens are merged away, at most half of those there are.

    merge: a number, or a share of an image's tokens for all layers together. vectors: a safetensors file with one
    tensor [layers, C] or [1, layers, C], such as a checkpoint's `cross_image`. hand_on: the decoder gets the cross
    token too.
    """

    name: ClassVar[str] = "crossget"
    source: ClassVar[str] = "CrossGET, arXiv 2305.17455"
    graph: ClassVar[str] = "vision"

    merge: int | float = 13
    vectors: str | None = None
    hand_on: bool = False

    def __post_init__(self) -> None:
        self.require_count_or_share("merge", "a number of tokens a layer")
        self.require(self.vectors is None or isinstance(self.vectors, str), "vectors", "the path of a safetensors file")
        self.require(isinstance(self.hand_on, bool), "hand_on", "true or false")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        layers = layers_of(tower)
        whole = edit.program.info.tokens_per_image
        going = merges(self.merge, whole, len(layers))
        if not any(going):
            raise Skipped(f"merge={self.merge} merges no token of {whole} in {len(layers)} layers")
        vectors = None if self.vectors is None else self._vectors(edit, len(layers), int(shape(layers[0].entering)[2]))
        merger: Merger | None = None
        for layer, merge in zip(layers, going, strict=True):
            renew_last(edit, layer, vectors, first=layer is layers[0])
            merger = merger or Merger(tower, layers)
            merger.weigh(layer)
            if merge:
                query, key, _, *rest = args_of(layer.attention)
                with edit.after(layer.residual):
                    importance = merger.call(layer, ops.received, query, key, *rest)
                    given = (key, importance, merger.size, merger.source)
                    matched = merger.call(layer, ops.crossget, *given, merge)
                merger.merge(layer, matched, merge)
        assert merger is not None  # a tower that something is merged in has layers
        self._finish(tower, merger.source)
        yield f"in the vision tower: {kept_text(edit)} visual tokens an image are left, {sum(going)} merged on the way"

    def _vectors(self, edit: Rewriter, layers: int, width: int) -> fx.Node:
        try:
            tensors = list(load_file(Path(str(self.vectors)).expanduser()).values())
        except (OSError, SafetensorError) as error:
            raise PassError(f"{self.name}: {self.vectors} cannot be read: {str(error).splitlines()[0]}") from None
        found: Tensor | None = tensors[0].squeeze(0) if len(tensors) == 1 else None
        if found is None or found.dim() != 2 or found.shape[0] < layers or found.shape[1] != width:
            held = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "nothing"
            raise PassError(
                f"{self.name}: {self.vectors} must hold one tensor [{layers} or more, {width}]; it holds {held}"
            )
        weights = edit.program.weights
        weights.put(VECTORS, nn.Parameter(found[:layers].to(weights.device(), edit.program.dtype)))
        return edit.weight(VECTORS)

    def _finish(self, tower: Tower, source: fx.Node) -> None:
        with tower.edit.before(tower.end):
            left = tower.call(aten.slice.Tensor, source, 1, 1, -1)
            if self.hand_on:
                nowhere = tower.call(aten.slice.Tensor, source, 1, 0, 1)  # that of CLS
                tower.become(tower.tokens, tower.call(aten.cat.default, [left, nowhere], 1))
            else:
                tower.become(tower.call(aten.slice.Tensor, tower.tokens, 1, 0, -1), left)
