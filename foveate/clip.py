"""Questions as CLIP sees them, for passes that choose visual tokens by the question (`cdpruner`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import InputError
from foveate.passes import CDPruner
from foveate.passes.pipeline import parse_pipeline


def questions(folder: str | Path, texts: Sequence[str]) -> Tensor:
    """Texts as a model with `cdpruner` takes them, one for each image of a batch: fp32 [len(texts), P].

    folder: a local CLIP (config.json, model.safetensors, and its tokenizer). A text longer than the tower takes is cut
    into segments; the result is the mean of their unit vectors. Raises InputError for a folder that is no such thing.
    """
    clip, tokenizer = _loaded(str(folder))
    room = clip.config.text_config.max_position_embeddings - 2
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        segments = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
        with torch.inference_mode():
            seen = [clip.text_model(input_ids=_wrapped(tokenizer, segment)).pooler_output for segment in segments]
            vectors = clip.text_projection(torch.cat(seen))
        found.append(normalize(vectors, dim=-1).mean(0))
    return torch.stack(found) if found else torch.zeros(0, clip.config.projection_dim)


def questions_for(model: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """The input `questions` of a model that chooses by them, made by the CLIP that its pass names; else none.

    texts: what is asked of each image of a batch. Raises InputError where that CLIP is not there any more.
    """
    records = model.program.passes if texts and hasattr(model, "program") else []
    used = [each for record in records if not record.skipped for each in parse_pipeline(record.text)]
    folders = [each.clip for each in used if isinstance(each, CDPruner) and each.clip != "none"]
    return {"questions": questions(folders[0], texts)} if folders else {}


@lru_cache(maxsize=1)
def _loaded(folder: str) -> tuple[Any, Any]:
    """A CLIP and its tokenizer; the last one stays, since questions come one after another."""
    from transformers import AutoTokenizer, CLIPModel

    local = {"local_files_only": True, "trust_remote_code": False}
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder; give a local CLIP")
    try:
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} is no folder of a CLIP: {str(error).splitlines()[0]}") from None
    return clip, tokenizer


def _wrapped(tokenizer: object, segment: list[int]) -> Tensor:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id  # type: ignore[attr-defined]  # transformers is untyped
    return torch.tensor([[start, *segment, end]])
