"""foveate's models in lmms-eval.

    lmms-eval --model foveate --model_args 'pretrained=DIR,passes="fastv{layer=2,keep=0.5}"' --tasks pope

lmms-eval (extra `lmms`) finds `manifest` by the entry point group `lmms_eval.models`; nothing in foveate imports this
module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from PIL import Image

import foveate
from foveate.cli.models import find_folder, is_saved, load_model, saved_processor
from foveate.cli.prompts import full_prompt
from foveate.errors import InputError
from foveate.evaluate import replies
from foveate.examples import Example
from foveate.passes.pipeline import resolve

NEW_TOKENS = 256
"""Longest reply where a task does not say."""

TAKEN = ("do_sample", "temperature", "top_p", "num_beams")
"""Of a task's generation_kwargs, what `generate` gets; others, such as `image_aspect_ratio`, are of other models."""

_TYPES = "tasks of output_type {} cannot be asked, those of generate_until can"


def manifest() -> Any:
    """What lmms-eval registers: the model `foveate`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="foveate", simple_class_path=f"{__name__}.Foveate")


class Foveate(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A MODEL of foveate's command line, optimized, as lmms-eval asks it: images and text in, text out."""

    def __init__(
        self,
        pretrained: str,
        passes: str = "",
        backend: str = "eager",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """pretrained: `digits`, a folder, one that foveate saved, or a hub id.

        passes: a pipeline, which is put in quotes where it holds several passes. dtype: of torch, else the weights'
        own. device: the first GPU if there is one. max_batch_size is for models that look for a batch size; it must be
        left out. Raises FoveateError subclasses.
        """
        super().__init__()
        if unknown:
            raise InputError(
                f"foveate has no argument {next(iter(unknown))!r}; there are: pretrained, passes, backend, dtype, "
                'device, batch_size; a pipeline of several passes is put in quotes, passes="A,B"'
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("foveate runs in one process of lmms-eval: start it without accelerate or torchrun")
        if max_batch_size is not None or not str(batch_size).isdecimal() or not int(batch_size):
            raise InputError(f"batch_size={batch_size}: give a number, at least 1; foveate looks for none itself")
        self.batch_size = int(batch_size)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = str(passes).strip("\"'")
        if is_saved(pretrained):
            if pipeline or dtype:
                raise InputError(f"{pretrained} was saved by foveate: leave passes and dtype out")
            self.model = foveate.load(find_folder(pretrained), backend=backend, device=place)
            self.processor = saved_processor(pretrained)
        else:
            chosen = resolve(pipeline)
            loaded = load_model(pretrained, dtype=dtype)
            self.processor = loaded.get_processor()
            self.model = foveate.optimize(loaded.model.to(place), chosen, backend=backend)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The reply to each request, in order, cut before the first of its task's stop words.

        A request's arguments are (text, options of generation, what gives the images of a document, document, task,
        split).
        """
        found: dict[int, str] = {}

        def options(number: int) -> str:
            return json.dumps(requests[number].args[1], sort_keys=True, default=str)

        # Those with the same options are asked together.
        for _, group in groupby(sorted(range(len(requests)), key=options), key=options):
            numbers = list(group)
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                found |= zip(part, self._batch([requests[number].args for number in part]), strict=True)
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not there; FoveateError says so. lmms-eval 0.7 makes text of the pairs that this would return."""
        raise InputError(f"foveate answers in words: {_TYPES.format('loglikelihood and multiple_choice')}")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not there; FoveateError says so."""
        raise InputError(f"foveate answers one round: {_TYPES.format('generate_until_multi_round')}")

    def _batch(self, arguments: Sequence[tuple[Any, ...]]) -> list[str]:
        options = dict(arguments[0][1])
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        taken = {name: options[name] for name in TAKEN if options.get(name) is not None}
        taken["do_sample"] = bool(taken.get("do_sample", taken.get("temperature", 0) > 0))
        if not taken["do_sample"]:
            taken = {name: value for name, value in taken.items() if name in ("do_sample", "num_beams")}
        examples = [self._example(text, *rest) for text, _, *rest in arguments]
        new_tokens = int(options.get("max_new_tokens") or NEW_TOKENS)
        said = replies(self.model, self.processor, examples, new_tokens, **taken)
        return [min((text.split(stop)[0] for stop in stops), key=len, default=text).strip() for text in said]

    def _example(self, text: str, get_images: Callable[[Any], Any], number: int, task: str, split: str) -> Example:
        """A request as a prompt in the model's own form, its images first unless the text says where they stand."""
        mark, place = str(getattr(self.processor, "image_token", "<image>")), f"{task}, document {number}"
        given = get_images(self.task_dict[task][split][number]) or []
        if other := [type(each).__name__ for each in given if not isinstance(each, Image.Image)]:
            raise InputError(f"{place} comes with a {other[0]}; foveate reads images (PIL), no video and no sound")
        images = [image.convert("RGB") for image in given]
        if mark not in text:
            return Example(full_prompt(self.processor, text, len(images)), images, place=place, question=text)
        if text.count(mark) != len(images):
            raise InputError(f"{place}: the text holds {text.count(mark)} {mark} for {len(images)} images")
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return Example(str(prompt), images, place=place)
