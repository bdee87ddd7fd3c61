"""What `generate` of transformers asks of a model, and what a model's call returns."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from foveate.cache import VisualTextCache
from foveate.ir.program import Program
from foveate.models.registry import FAMILIES

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""What the installed transformers calls the cache in calls and in `generate`; `cache` from 5.24 on."""

UNTIL = "until"
"""How many tokens of prompt and answer will be run in all, as a model's call takes it."""


@dataclass
class NextToken(ModelOutput):  # type: ignore[misc]  # transformers is untyped
    """What an optimized model returns.

    loss: of the labels that were given. logits: [B, 1, V] of the token after the last; with labels [B, k, V], one for
    each label of a row. labels: int64 [B, k], what those logits should predict, -100 where a row has fewer than k.
    cache (or past_key_values): what decoding goes on from. kept: for each layer before which visual tokens were
    selected, the places in the prompt of those that stay, int64 [B, k], padded with the largest int64. held: for each
    layer whose cache keys are evicted from, the places in the prompt of those that stay in each key head, int64
    [B, Hk, C], padded in the same way.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    cache: Any = None
    kept: dict[int, Tensor] | None = None
    held: dict[int, Tensor] | None = None

    @property
    def past_key_values(self) -> Any:
        """The cache, by the name that transformers gave it before 5.24."""
        return self.cache


class Generates(GenerationMixin):  # type: ignore[misc]  # transformers is untyped
    """Greedy, sampled and beam search over a program, with a cache of visual and text keys."""

    program: Program

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: VisualTextCache | None = None,
        cache: VisualTextCache | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The whole prompt first, then what the cache has not seen."""
        cache = past_key_values if cache is None else cache
        seen = cache.get_seq_length() if cache is not None else 0
        inputs = {"input_ids": input_ids[:, seen:], "cache": cache}
        inputs["use_cache"] = options.get("use_cache", True)
        if UNTIL in options:
            inputs[UNTIL] = options[UNTIL]
        if not seen:
            inputs |= {"attention_mask": attention_mask, **{name: options.get(name) for name in self._given()}}
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *unused: Any, **also_unused: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = VisualTextCache()
        if self.program.info.position_limit is not None:
            model_kwargs[UNTIL] = generation_config.max_length - 1  # the last token is not run

    def _update_model_kwargs_for_generation(
        self, outputs: NextToken, model_kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *rest, **options)
        if outputs.cache is not None:
            kwargs[CACHE] = outputs.cache
        return kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each row; a row's images are repeated as a block, so that every copy has all of them in order."""
        about, family = self.program.info, FAMILIES[self.program.info.family]
        given = {name: value for name in self._given() if (value := model_kwargs.pop(name, None)) is not None}
        if given and input_ids is not None and expand_size > 1:
            for name, counts in family.images_in(about, given, input_ids).items():
                parts = given[name].split(counts)
                given[name] = torch.cat([part for part in parts for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return ids, {**kwargs, **given}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What belongs to images depends on the family, so it is no parameter of its own."""
        super()._validate_model_kwargs({n: value for n, value in model_kwargs.items() if n not in self._given()})

    def _given(self) -> tuple[str, ...]:
        """Names of what belongs to the images of a prompt."""
        return (*FAMILIES[self.program.info.family].takes, "questions")
