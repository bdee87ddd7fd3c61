"""`foveate run` of an exported package without torch, whose import takes longer than a short answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import BackendError

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.runner import NumpyModel


def open_quickly(name: str, backend: str | None, images: bool) -> NumpyModel | None:
    """The package of that name, to be run over numpy arrays; None where it has to be run in the ordinary way."""
    from foveate.cli.models import is_saved

    if backend not in (None, "onnx") or not is_saved(name):
        return None
    from foveate.runner import open_package

    try:
        model = open_package(Path(name).expanduser())
    except BackendError:
        return None
    # What is asked of each image is read by a CLIP, which is torch's.
    return None if images and "questions" in model.graphs["vision"].inputs else model


def ask(model: NumpyModel, name: str, prompt: str, pictures: Sequence[Image], max_new_tokens: int) -> dict[str, Any]:
    """What `foveate run` tells of an answer."""
    from foveate.cli.models import saved_processor
    from foveate.cli.prompts import check_length, full_prompt, told
    from foveate.cli.quiet import spare_torch
    from foveate.examples import TEXT
    from foveate.runner.prompts import PAD

    spare_torch()
    processor = saved_processor(name)
    text = full_prompt(processor, prompt, len(pictures))
    made = processor(text=[text], images=list(pictures) or None, return_tensors="np")
    inputs = {name: made[name] for name in (*TEXT, "pixel_values") if name in made}
    ids = inputs["input_ids"]
    check_length(ids.shape[1], max_new_tokens, model.longest)
    first = model(**inputs)
    # The prompt is run once: the answer goes on from what also tells which tokens stay.
    answer = [tokens[0] for tokens in model.tokens(first, max_new_tokens=max_new_tokens, do_sample=False)]
    kept = {layer: [[int(p) for p in row if p != PAD] for row in rows] for layer, rows in (first.kept or {}).items()}
    return {
        **told(processor, ids, answer, model.about.image_token_id, kept),
        "prompt": text,
        "passes": model.passes,
        "backend": model.backend,
    }
