"""The ways to select visual tokens that `selection.py` compares, and the prompts it compares them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.calibrate import calibrate
from foveate.examples import Example, batch_inputs
from foveate.ir.program import outputs
from foveate.ir.statistics import Statistics
from foveate.models import digits

TARGETS = (0.5, 0.25, 0.12)
"""Of the visual work in the decoder."""
KEPT = 0.25
CALIBRATION = 64
"""Questions that FitPrune's schedule is found by."""
BLIND = "cut-visual{from_layer=0}"
SHARES = tuple(round(0.01 * step, 2) for step in range(2, 100))
BUDGETS = tuple(share for share in SHARES if share > 0.1)
"""FitPrune deletes nothing before the first layer's attention, which alone is a tenth of the work."""
ADDED = (0.04, 0.05, 0.06, 0.07, 0.08, 0.16, 0.18, 0.2, 0.22, 0.24, 0.4, 0.42, 0.44, 0.46, 0.48)
"""Of an image's tokens, beside those up to the turn of its curve."""
Rows = dict[str, dict[str, Any]]
"""By pipeline."""


@dataclass(frozen=True)
class Method:
    """A pipeline with one setting left open, where `@` stands: a share, or a number of `values`.

    at: the pipeline that leaves a quarter of 576 tokens of the benchmark decoder, in place of `@` = 0.25.
    """

    name: str
    template: str
    values: tuple[float, ...] = SHARES
    at: str = ""

    def passes(self, value: float) -> str:
        """The pipeline at one value; `1-@`, `@/4` and so on are worked out."""
        text = self.template.replace("1-@", f"{1 - value:g}")
        for divisor in (8, 4, 2):
            text = text.replace(f"@/{divisor}", f"{value / divisor:g}")
        return text.replace("@", f"{value:g}")

    def quarter(self) -> str:
        """What runs on the benchmark decoder."""
        return self.at or self.passes(KEPT)


METHODS = (
    Method("random", "random-prune{layer=0,keep=@}"),
    Method("uniform grid", "grid-prune{layer=0,keep=@}"),
    Method("average pooling", "average-pool{factor=@}", (4, 3, 2), "average-pool"),
    Method("smaller image", "resize{grid=@}", tuple(range(2, 12)), "resize{grid=12}"),
    Method("FastV", "fastv{layer=1,keep=@}", at="fastv{layer=2,keep=0.25}"),
    Method("PyramidDrop", "pyramiddrop{layers=[1,3,5],keep=@}", at="pyramiddrop{layers=[2,4,6],keep=0.5}"),
    Method(
        "SparseVLM", "sparsevlm{layers=[0,2,4],keeps=[@,@/2,@/4]}", at="sparsevlm{layers=[1,3,5],keeps=[0.5,0.3,0.2]}"
    ),
    Method("DART", "dart{layer=1,keep=@}", at="dart{layer=2,keep=0.25}"),
    Method("DivPrune", "divprune{keep=@}"),
    Method("FasterVLM", "fastervlm{keep=@}"),
    Method("VisPruner", "vispruner{keep=@}"),
    Method("VisionZip", "visionzip{dominant=@,contextual=@/4}", at="visionzip{dominant=0.21,contextual=0.04}"),
    Method("PruMerge", "prumerge{keep=@}"),
    Method("PruMerge+", "prumerge{keep=@,plus=true}"),
    Method("CDPruner, no question", "cdpruner{keep=@,clip=none}"),
    Method("ToMe", "tome{merge=1-@}"),
    Method("CrossGET, not trained", "crossget{merge=1-@}"),
    Method("FitPrune", "fitprune{budget=@}", BUDGETS, at="fitprune{schedule=[0,200,120,60,30,22,0,0,0,0,0,0]}"),
    Method(
        "SparseVLM, by rank",
        "sparsevlm{layers=[0,2,4],counts=rank,scale=1-@}",
        at="sparsevlm{layers=[1,3,5],counts=rank,scale=0.8}",
    ),
    Method("CLS curve", "cls-curve{alpha=@,alpha_mode=floor_add}", ADDED, "cls-curve{alpha=0.2,alpha_mode=floor_add}"),
    Method("CLS curve, alpha 0.075", "cls-curve{alpha=@}", (0.075,), "cls-curve{alpha=0.075}"),
    Method(
        "LVPruning, trained",
        "lvpruning{layers=[1,3,5],ratio=@,step=@/4,modules=lvpruning.safetensors}",
        at="lvpruning{layers=[2,4,6],ratio=0.35,step=0.1,modules=MODULES}",
    ),
    Method(
        "DynamicViT, trained",
        "dynamicvit{layers=[1,3,5],keep=@,modules=dynamicvit.safetensors}",
        at="dynamicvit{layers=[2,4,6],keep=0.5,modules=MODULES}",
    ),
    Method(
        "SmartTrim, trained",
        "smarttrim{layers=[1,3,5],keep=@,modules=smarttrim.safetensors}",
        at="smarttrim{layers=[2,4,6],keep=0.1,modules=MODULES}",
    ),
    Method("SnapKV", "snapkv{capacity=@,window=8}", TARGETS, "snapkv{capacity=0.25}"),
    Method("heavy-recent", "heavy-recent{heavy=@/2,recent=@/2}", TARGETS, "heavy-recent{heavy=0.125,recent=0.125}"),
)


def placed(passes: str, folder: Path) -> str:
    """A pipeline whose modules lie in a folder."""
    return passes.replace("modules=", f"modules={folder}/")


def prompts(model: Any, processor: Any, n: int) -> dict[str, Any]:
    """Training questions as one batch."""
    drawn = digits.samples(split="train", task="mixed", n=n, seed=8204)
    examples = [Example(each.prompt, (each.image,)) for each in drawn]
    return batch_inputs(model, processor, examples, 6, padding_side="left")


def calibrated(model: Any, processor: Any) -> Statistics:
    """What visual tokens receive in training questions."""
    drawn = digits.samples(split="train", task="mixed", n=CALIBRATION, seed=8203)
    return calibrate(model, processor, [Example(each.prompt, [each.image]) for each in drawn], batch=8, tokens=True)


@torch.inference_mode()
def lengths(optimized: Any, inputs: dict[str, Any]) -> list[int]:
    """Visual tokens of a prompt that stand in each layer of the decoder, in the mean over a batch where they differ."""
    program = optimized.program
    sizes = {-1: program.tokens_left}
    if outputs(program.prefill)["kept"] or program.depends_on_image:
        for layer, order in (optimized(**inputs, use_cache=False).kept or {}).items():
            if layer or program.depends_on_image or not program.shortens:
                sizes[layer] = round(float((order >= 0).sum(1).float().mean()))
    seen = [e[0] is not None for e in outputs(program.prefill)["kv"]]
    return [sizes[max(at for at in sizes if at <= layer)] if seen[layer] else 0 for layer in range(len(seen))]
