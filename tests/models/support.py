"""Which family takes which pass, and where it runs: tried on small models, and written down as docs/support.md.

python -m tests.models.support        tries everything again and writes the page
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.backends.base import lower
from foveate.errors import BackendError, FoveateError, FoveateWarning
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from foveate.passes.pipeline import PASSES, resolve
from foveate.passes.select.learned import LearnedSelection
from tests.models.prompts import made
from tests.models.test_running import MODELS, source, traced

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
TOLERANCE = 1e-4

TEXTS = {
    "average-pool": "average-pool{factor=SIDE}",
    "cdpruner": "cdpruner{keep=0.5,clip=none}",
    "cls-curve": "cls-curve{layer=0}",
    "crossget": "crossget{merge=3}",
    "cut-visual": "cut-visual{from_layer=2}",
    "dart": "dart{layer=1,keep=0.5}",
    "divprune": "divprune{keep=0.5}",
    "drop-visual-heads": "drop-visual-heads{keep=2,from_layer=0}",
    "drop-visual-neurons": "drop-visual-neurons{keep=0.5}",
    "dynamicvit": "dynamicvit{layers=[1],keep=0.5}",
    "fastervlm": "fastervlm{keep=0.5}",
    "fastv": "fastv{layer=1,keep=0.5}",
    "fitprune": "fitprune{schedule=[0,3,0]}",
    "grid-prune": "grid-prune{layer=1,keep=0.5}",
    "heavy-recent": "heavy-recent{heavy=8,recent=8}",
    "lvpruning": "lvpruning{layers=[1],ratio=0.5}",
    "neighbor-attention": "neighbor-attention{radius=1}",
    "prumerge": "prumerge{keep=0.5}",
    "pyramiddrop": "pyramiddrop{layers=[1,2],keep=0.5}",
    "random-prune": "random-prune{layer=1,keep=0.5}",
    "resize": "resize{grid=2}",
    "smarttrim": "smarttrim{keep=0.5}",
    "snapkv": "snapkv{capacity=8,window=2}",
    "sparsevlm": "sparsevlm{layers=[0,1],keeps=[0.5,0.25]}",
    "tome": "tome{merge=3}",
    "visionzip": "visionzip{dominant=0.3,contextual=0.3}",
    "vispruner": "vispruner{keep=0.5}",
}
"""Each pass as it is tried, on decoders of three layers; SIDE: the least number that divides the rows of an image."""

BOTH, EAGER, REFUSED = "eager, ONNX", "eager", "-"


def tried(model: Any, program: Any, text: str, inputs: dict[str, Any]) -> tuple[str, str]:
    """Where a pass runs, and why not where it does not: eager torch must answer, and ONNX Runtime the same."""
    rows = program.info.grid[0]
    text = text.replace("SIDE", str(next(n for n in range(2, rows + 1) if rows % n == 0)))
    (chosen,) = resolve(text)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", FoveateWarning)
        if isinstance(chosen, LearnedSelection):
            file = Path(folder) / "modules.safetensors"
            chosen.new(program, 0).save(file)
            text = f"{text.removesuffix('}')},modules={file}}}"
        try:
            eager = foveate.optimize(model, text, traced=program)
        except FoveateError as error:
            return REFUSED, str(error)
        if any(n.name == "questions" for n in eager.program.graphs["vision"].nodes):
            shape = next(n for n in eager.program.graphs["vision"].nodes if n.name == "questions").meta["val"].shape
            inputs = {**inputs, "questions": torch.ones(len(inputs["pixel_values"]), shape[1])}
        with torch.inference_mode():
            expected = eager(**inputs).logits
            assert bool(expected.isfinite().all())
            try:
                runners = lower(eager.program, "onnx")
            except BackendError as error:
                return EAGER, str(error)
            there = OptimizedModel(eager.program, model.config, None, "onnx", lambda: runners)
            found = there(**inputs).logits
    assert float((found - expected).abs().max()) < TOLERANCE, text
    return BOTH, ""


def reason(name: str, family: str, why: str) -> str:
    """What is said of a pass and a family, without their names, so that others who say the same share a line."""
    why = (
        why.removeprefix(f"{name}: ")
        .replace(f"tower of {family}: ", "tower: ")
        .replace(f"tower of {family} ", "tower ")
        .replace(f"norms of {family} ", "norms ")
    )
    return re.sub(rf"^{name}.*? cannot be|{name}", lambda found: "it cannot be" if " " in found[0] else "the pass", why)


def families() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """A small model of each family, its program and a batch of prompts."""
    llava = random_llava(layers=3)
    found = {"llava": (llava, foveate.trace(llava), random_inputs(llava, batch=2, images=2))}
    for name in MODELS:
        kind = source(name).config.model_type
        if kind not in found:
            found[kind] = source(name), traced(name), made(source(name), 0, [[2], [0], [1]]).inputs
    return found


def page() -> str:
    """docs/support.md."""
    assert set(TEXTS) == set(PASSES), "say here how each pass is tried"
    models = families()
    reasons: dict[str, int] = {}
    lines = [
        "# What runs where",
        "",
        "Made by `python -m tests.models.support`, which tries every pass on a small model of every family, in eager",
        "torch and on ONNX Runtime, where both must give the same logits. The inductor backend runs what eager runs.",
        "",
        f"| pass | {' | '.join(f'`{name}`' for name in models)} |",
        f"|---|{'---|' * len(models)}",
    ]
    for name, text in sorted(TEXTS.items()):
        cells = []
        for family, (model, program, inputs) in models.items():
            where, why = tried(model, program, text, inputs)
            why = reason(name, family, why)
            note = f" [{reasons.setdefault(why, len(reasons) + 1)}]" if why else ""
            cells.append(f"{where}{note}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "Where it does not run, this is what it says:", ""]
    lines += [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
