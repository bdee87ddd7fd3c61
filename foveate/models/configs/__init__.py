"""Configurations of well-known models, so that they can be traced and costed without weights and without a network.

Each file is our own transcription of the sizes in a published `config.json`: what it is, where the facts come from,
how many parameters the model's card gives, and a small Hugging Face configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.errors import InputError, UnsupportedModelError

FOLDER = Path(__file__).parent

__all__ = ["config_of", "names", "read", "weightless"]


def names() -> list[str]:
    """Names of the configurations, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    """What a file holds: `about`, `source`, `published_parameters`, `config`. The case of the name does not matter.

    Raises InputError, with the names that exist, for any other name.
    """
    if name.lower() not in names():
        raise InputError(f"there is no configuration {name!r}; there are: {', '.join(names())}")
    value = json.loads((FOLDER / f"{name.lower()}.json").read_text(encoding="utf-8"))
    assert isinstance(value, dict)  # our own file
    return value


def config_of(name: str) -> Any:
    """The `PretrainedConfig` of that name; InputError, with the names that exist, if there is none."""
    from transformers import AutoConfig

    config = dict(read(name)["config"])
    return AutoConfig.for_model(config.pop("model_type"), **config)


def weightless(name_or_config: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model in evaluation mode on the `meta` device, where weights have shapes and take no memory.

    Takes a name of a configuration, or a `PretrainedConfig`. Raises InputError for an unknown name, and
    UnsupportedModelError for a configuration from which transformers builds no image-text model.
    """
    from transformers import AutoModelForImageTextToText, PreTrainedConfig
    from transformers.initialization import no_init_weights

    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if not isinstance(config, PreTrainedConfig) or type(config) not in AutoModelForImageTextToText._model_mapping:
        kind = getattr(config, "model_type", type(config).__name__)
        raise UnsupportedModelError(
            f"{kind} is no configuration of an image-text model; shipped configurations: {', '.join(names())}"
        )
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()  # which transformers leaves to those who give weights their values
    assert isinstance(model, nn.Module)
    return model.eval()
