"""What MODEL means where its graphs are enough: programs without weights wherever weights say nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.cli.errors import UseError
from foveate.cli.models import DIGITS, RANDOM, find_config, is_saved, load_model, load_saved, random_model
from foveate.cli.options import DTYPES
from foveate.cli.quiet import hush

Tick = Callable[[str, int, int], None]


def dense_program(name: str, dtype: str | None = None, sizes: Mapping[str, int] | None = None) -> Any:
    """The program of MODEL before any pass: `digits`, `random:llava`, a shipped configuration, a folder, a hub id.

    dtype: of the weights, where they are made up here (torch's name; default: the configuration's own). sizes: of
    `random:llava`, as in `options.SIZES`. Of a folder or hub id only config.json is read. Raises UseError or
    UnsupportedModelError.
    """
    hush()
    from foveate.models.registry import trace_program

    if name == DIGITS:
        return trace_program(load_model(name).model)
    if name == RANDOM:
        shape = dict(sizes or {})
        if math.isqrt(shape.get("visual_tokens", 0)) ** 2 != shape.get("visual_tokens", 0):
            # The number of tokens is an argument of every forecast, so the model's own image may be another one.
            del shape["visual_tokens"]
        return trace_program(random_model(shape, dtype if dtype in DTYPES else None, "meta"))
    import torch

    from foveate.models import configs

    if name.lower() in configs.names():
        return trace_program(configs.weightless(name, _torch_dtype(dtype) or torch.bfloat16))
    if not Path(name).expanduser().exists() and "/" not in name:
        known = ", ".join((DIGITS, RANDOM, *configs.names()))
        raise UseError(f"there is no model {name}; MODEL is {known}, a folder, or a hub id such as owner/name")
    config = find_config(name)
    return trace_program(configs.weightless(config, _torch_dtype(dtype) or config.dtype or torch.bfloat16))


def load_program(
    name: str, passes: str, dtype: str | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[str, Any]:
    """(name, program) of MODEL after a pipeline; a folder that foveate saved has its passes already.

    Raises FoveateError subclasses.
    """
    hush()
    from foveate.passes.pipeline import apply_pipeline, resolve

    if is_saved(name):
        if passes:
            raise UseError(f"{name} was saved by foveate and has its passes already; leave --passes out")
        return Path(name).name, load_saved(name, "eager").program
    chosen = resolve(passes)
    return name, apply_pipeline(dense_program(name, dtype, sizes), chosen)


def dense_of_saved(name: str) -> Any:
    """The program before any pass of the model in a folder that foveate saved, without weights."""
    from foveate.models import configs
    from foveate.models.registry import trace_program

    saved = load_saved(name, "eager")
    return trace_program(configs.weightless(saved.config, saved.dtype))


def _torch_dtype(name: str | None) -> Any:
    """A torch dtype that a program can be traced in; narrower formats are a matter of the forecast."""
    import torch

    return getattr(torch, name) if name in DTYPES else None


def forecast_programs(
    name: str, recipes: Sequence[str], dtype: str | None, sizes: Mapping[str, int], tick: Tick
) -> tuple[Any, dict[str, Any], str]:
    """(dense program, pipeline text -> program, name) of MODEL and each recipe; the model is traced once.

    Of a folder that foveate saved, its own passes are the one recipe. Raises FoveateError subclasses.
    """
    hush()
    from foveate.passes.pipeline import apply_pipeline, pipeline_text, resolve

    if is_saved(name):
        label, program = load_program(name, ",".join(recipes))
        tick("tracing", 0, 1)
        return dense_of_saved(name), {",".join(r.text for r in program.passes) or "no passes": program}, label
    chosen = [resolve(recipe) for recipe in recipes]
    tick("tracing", 0, 1 + len(chosen))
    dense = dense_program(name, dtype, sizes)
    programs = {}
    for place, (recipe, passes) in enumerate(zip(recipes, chosen, strict=True)):
        tick("applying passes", 1 + place, 1 + len(chosen))
        text = recipe if recipe.startswith("recipe:") else pipeline_text(passes)
        programs[text or "no passes"] = apply_pipeline(dense.copy(), passes)
    tick("applying passes", 1 + len(chosen), 1 + len(chosen))
    return dense, programs, name
