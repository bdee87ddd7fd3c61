"""How an answer is written: greedily or by sampling, how long, and what ends it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from foveate.errors import BackendError, InputError
from foveate.manifest import reading

SAMPLING = ("temperature", "top_k", "top_p")

UNHEEDED = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_implementation",
    "early_stopping",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
"""Settings of transformers that change no token here."""

NEUTRAL = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "length_penalty": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "typical_p": 1,
}
"""What those are that would change nothing; others are then 0, false, empty or null."""

PLAIN = (int, float, str, list, tuple, dict)
"""Kinds of value that JSON has."""

DEFAULT_LENGTH = 20
"""New tokens where nobody says how many, as in transformers."""


@dataclass(frozen=True)
class Settings:
    """Of one answer, with what transformers takes where nothing is said.

    max_length counts the prompt too, and yields to max_new_tokens. eos_token_id: what ends a row. pad_token_id: what
    fills a row that has ended; the first that ends one if None. seed: of sampling; another each time if None.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    seed: int | None = None

    @classmethod
    def read(cls, path: Path) -> Settings:
        """From a `generation_config.json`; ArtifactError if it is damaged, BackendError for what is not done here."""
        with reading(path):
            content = dict(json.loads(path.read_text(encoding="utf-8")))
        try:
            return cls().given({name: value for name, value in content.items() if not name.startswith("_")})
        except InputError as error:
            raise BackendError(f"{path}: {error}") from None

    def given(self, options: Mapping[str, Any]) -> Settings:
        """These with others in their place; InputError for what is not known or makes no sense."""
        named: dict[str, Any] = {}
        for name, value in options.items():
            if value is None or name in UNHEEDED:
                continue
            if name in self.__dataclass_fields__:
                named[name] = value
            elif not isinstance(value, PLAIN) or (value and value != NEUTRAL.get(name)):
                raise InputError(
                    f"{name} is not heeded over numpy arrays, only greedy search and sampling by "
                    f"{', '.join(SAMPLING)}: load the package without tensors='np'"
                )
        ends = named.get("eos_token_id", self.eos_token_id)
        named["eos_token_id"] = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        return replace(self, **named)._checked()

    def _checked(self) -> Settings:
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens is None or _whole(self.max_new_tokens, 1), "a whole number above 0"),
            ("max_length", self.max_length is None or _whole(self.max_length, 1), "a whole number above 0"),
            ("do_sample", isinstance(self.do_sample, bool), "true or false"),
            ("temperature", _number(self.temperature) and self.temperature > 0, "a number above 0"),
            ("top_k", _whole(self.top_k, 0), "a whole number, 0 for all tokens"),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("eos_token_id", all(_whole(each, 0) for each in self.eos_token_id), "a token's number, or several"),
            ("pad_token_id", self.pad_token_id is None or _whole(self.pad_token_id, 0), "a token's number"),
            ("seed", self.seed is None or _whole(self.seed, 0), "a whole number"),
        ):
            if not right:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")
        return self

    def new_tokens(self, prompt: int) -> int:
        """The longest answer to a prompt of so many tokens."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return DEFAULT_LENGTH if self.max_length is None else max(1, self.max_length - prompt)

    @property
    def padding(self) -> int:
        """The token behind the end of a row."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_token_id), 0)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
