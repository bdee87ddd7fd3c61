"""Show the tower a smaller image: the baseline that saves in the tower too.

before                                        after
patches of pixels [I, 3, H, W]                patches of the image at grid x grid patches, antialiased
+ embeddings of h x w places                  + embeddings of the places, bicubic, as a tower takes other sizes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from foveate.ir.program import args_of, info
from foveate.ir.rewriter import Rewriter
from foveate.ir.vision import Tower, aten
from foveate.passes.base import Pass, Skipped, whole
from foveate.passes.select.vision import kept_text


@dataclass(frozen=True)
class Resize(Pass):
    """The image is seen in `grid` rows and columns of patches; grid: 1 to as many as the tower has."""

    name: ClassVar[str] = "resize"
    source: ClassVar[str] = "baseline: a smaller image"
    graph: ClassVar[str] = "vision"

    grid: int = 12

    def __post_init__(self) -> None:
        self.require(whole(self.grid) and self.grid >= 1, "grid", "rows of patches, 1 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        tower.check_single()
        tower.check_whole()
        height, width = edit.program.info.grid
        self.require(self.grid <= min(height, width), "grid", f"1 to {min(height, width)}, the tower's own")
        if self.grid == height == width:
            raise Skipped(f"the image is seen in {height} x {width} patches already")
        nodes = list(edit.graph.nodes)
        convolution = next(n for n in nodes if n.target == aten.conv2d.default)
        embedding = next(n for n in nodes if n.target == aten.embedding.default)
        about = tower.about("resize").with_(layer=-1)
        pixels, kernel = args_of(convolution)[:2]
        size = [self.grid * side for side in kernel.meta["val"].shape[2:]]
        with edit.before(convolution):
            small = edit.call(aten._upsample_bilinear2d_aa.default, pixels, size, False, None, None, about=about)
        edit.replace(pixels, small, where=lambda user: user is convolution)
        self._embed(edit, embedding)
        with edit.before(tower.end):
            edit.refresh()
            rows, columns = ([int((i + 0.5) * side / self.grid) for i in range(self.grid)] for side in (height, width))
            places = torch.tensor([[row * width + column for row in rows for column in columns]])
            edit.program.weights.put("foveate.resize.places", places.to(edit.program.weights.device()))
            images = tower.call(aten.sym_size.int, tower.tokens, 0)
            source = tower.call(aten.expand.default, edit.weight("foveate.resize.places"), [images, -1])
            tower.become(tower.tokens, source)
        yield f"the tower sees {self.grid} x {self.grid} patches: {kept_text(edit)} visual tokens an image"

    def _embed(self, edit: Rewriter, embedding: fx.Node) -> None:
        """Let the embedding of places look into a table of the smaller grid."""
        height, width = edit.program.info.grid
        old = edit.program.weights.get(args_of(embedding)[0].target)
        places = old.detach()[1:].T.unflatten(1, (height, width))[None].float()
        places = torch.nn.functional.interpolate(places, size=(self.grid, self.grid), mode="bicubic")
        table = torch.cat([old.detach()[:1], places[0].flatten(1).T.to(old.dtype)])
        edit.program.weights.put("foveate.resize.embedding", nn.Parameter(table, old.requires_grad))
        about = info(embedding).with_(by=self.name)
        with edit.before(embedding):
            new = edit.call(aten.unsqueeze.default, edit.weight("foveate.resize.embedding"), 0, about=about)
        edit.replace(embedding, new)
