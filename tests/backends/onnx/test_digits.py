"""The bundled model with every shipped recipe that it can take: one export each, as torch at every length."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.errors import PassError
from foveate.models import digits
from foveate.passes.pipeline import recipes

FOR_OTHERS = ("yopo-internvl2-", "yopo-qwen2-vl-heads")
"""Recipes that name as many heads or layers as larger models have."""


@functools.cache
def source() -> tuple[Any, Any, Any]:
    model, processor = digits.load()
    return model, processor, foveate.trace(model)


def batches() -> list[dict[str, torch.Tensor]]:
    """Three sets of lengths: one prompt, a longer one, and three of unlike lengths beside each other."""
    processor = source()[1]
    samples = {task: digits.samples(task=task, n=2, seed=5) for task in ("lookup", "row")}
    lookup, row = samples["lookup"], samples["row"]
    more = row[1].prompt.replace("<image>", "")
    sets = [[lookup[0].prompt], [f"{row[0].prompt} {more} {more}"]]
    sets.append([lookup[1].prompt, row[1].prompt, sets[1][0]])
    image = lookup[0].image
    return [
        dict(processor(text=texts, images=[image] * len(texts), padding=True, return_tensors="pt")) for texts in sets
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_answers_as_torch_does(recipe: str, tmp_path: Path) -> None:
    model, _, program = source()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # digits gains nothing from some, which they say
        try:
            eager = foveate.optimize(model, f"recipe:{recipe}", traced=program)
        except PassError:
            assert recipe.startswith(FOR_OTHERS)
            return
    foveate.export(eager, output=tmp_path / "out", verify=False)
    there = foveate.load(tmp_path / "out")
    lengths = set()
    for inputs in batches():
        lengths.add(inputs["input_ids"].shape)
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        with torch.inference_mode():
            a, b = eager(**inputs), there(**inputs)
            answers = [each.generate(**inputs, **options) for each in (eager, there)]
        largest = float(a.logits.abs().max())
        assert float((b.logits - a.logits).abs().max()) <= 1e-5 * max(largest, 1), recipe
        assert set(b.kept or {}) == set(a.kept or {})
        assert all(torch.equal(b.kept[layer], places) for layer, places in (a.kept or {}).items())
        assert torch.equal(*answers)
    assert len(lengths) == 3
