"""Keep the visual embeddings that matter to the question and differ from one another.

    before                          after
    projector makes out [I, N, D]   r = relevance(projection(norm(features)); questions), in CLIP's own space
    the decoder reads out           s = picks by the determinant of r_i cos(out_i, out_j) r_j
                                    the decoder reads out [I, floor(keep * N), D], best s, old order

CDPruner (arXiv 2506.10967, section 3): a conditional determinantal point process, maximised greedily. As in its code,
relevance is the negative of the cosine. A LLaVA has no text tower: the questions are an input of the vision graph, made
by `foveate.questions`. Positions are numbered anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import shape
from foveate.ir.vision import Tower, aten
from foveate.passes.base import number
from foveate.passes.select.vision import VisionSelection

PARTS = {
    "norm": "vision_model.post_layernorm.weight",
    "bias": "vision_model.post_layernorm.bias",
    "projection": "visual_projection.weight",
}
"""What is read of a CLIP."""


@dataclass(frozen=True)
class CDPruner(VisionSelection):
    """floor(keep * n) of an image's n visual tokens stay; keep: above 0, up to 1.

    clip: the local folder of the CLIP that the tower is of (config.json, model.safetensors), or `none`: no question is
    asked, and tokens are chosen by difference alone. theta: 0 to below 1, how much relevance counts; relevance as it
    is where not given.
    """

    name: ClassVar[str] = "cdpruner"
    source: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    projected: ClassVar[bool] = True

    clip: str = ""
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.clip, str) and self.clip != "", "clip", "the folder of a CLIP, or none")
        self.require(self.theta is None or (number(self.theta) and 0 <= self.theta < 1), "theta", "0 to below 1")
        if self.clip == "none" and self.theta is not None:
            raise PassError(f"{self.name}: theta has no meaning with clip=none, where all tokens matter the same")

    def scores(self, tower: Tower) -> fx.Node:
        """Picks."""
        tower.check_whole()
        relevance = None if self.clip == "none" else self._relevance(tower)
        theta = None if self.theta is None else float(self.theta)
        return tower.call(ops.determinant_scores, tower.tokens, relevance, float(self.keep), theta)

    def by_segment(self) -> tuple[str, float]:
        """By difference alone: PassError with a CLIP, which is not that of such a tower."""
        if self.clip != "none":
            raise PassError(f"{self.name}: clip must be none: a tower that takes images as one sequence is no CLIP's")
        return "determinant", 0.0

    def how(self) -> str:
        """By the picks."""
        return "those that differ most" + ("" if self.clip == "none" else " and matter to the question")

    def _relevance(self, tower: Tower) -> fx.Node:
        edit, features = tower.edit, Tower(tower.edit, self.name).tokens
        if (about := edit.program.info).tower != "patches":
            raise PassError(f"{self.name}: clip must be none: the tower of {about.family} is not that of a CLIP")
        weights, eps = _clip(Path(self.clip), self.name)
        width, wanted = int(shape(features)[2]), weights["projection"].shape[1]
        if width != wanted:
            raise PassError(f"{self.name}: the CLIP in {self.clip} projects {wanted} features, this tower has {width}")
        for part, value in weights.items():
            edit.program.weights.put(f"cdpruner.{part}.weight", value.to(edit.program.weights.device()))
        norm, bias, projection = (edit.weight(f"cdpruner.{part}.weight") for part in PARTS)
        size = "images", int(weights["projection"].shape[0])
        fake = edit.program.symbols.tensor(*size, dtype=torch.float32, device=edit.program.weights.device())
        questions = edit.placeholder("questions", fake, NodeInfo(-1, "questions"))
        x = tower.call(aten.to.dtype, features, torch.float32)
        x = tower.call(aten.layer_norm.default, x, [width], norm, bias, eps, False)
        return tower.call(ops.relevance, tower.call(aten.linear.default, x, projection), questions)


def _clip(folder: Path, name: str) -> tuple[dict[str, Tensor], float]:
    """What projects a CLIP's image tokens, fp32, and the epsilon of its norm; PassError for another folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        eps = float(config.get("vision_config", {}).get("layer_norm_eps", 1e-5))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            found = {part: file.get_tensor(path).float() for part, path in PARTS.items()}
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise PassError(f"{name}: {folder} is no folder of a CLIP: {str(error).splitlines()[0]}") from None
    return found, eps
