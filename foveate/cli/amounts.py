"""Options for what a cost is forecast for, which `cost`, `snapshot` and `diff` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from foveate.cli.errors import UseError
from foveate.cli.models import RANDOM
from foveate.cli.options import AT_LEAST_ONE, SIZES, F, given_sizes, size_options

DTYPES = ("float32", "bfloat16", "float16", "float8", "int8", "int4")
"""Number formats that a forecast knows."""


def amount_options(command: F) -> F:
    """What the cost is forecast for; each is None where it was not given."""
    options: tuple[Callable[[F], F], ...] = (
        click.option("--text-tokens", type=AT_LEAST_ONE, help="Text tokens of a prompt.  [default: 60]"),
        click.option("--batch", type=AT_LEAST_ONE, help="Prompts at once.  [default: 1]"),
        click.option("--device", help="A known device, or a YAML file with one.  [default: h100, or cpu for fp32]"),
        click.option("--dtype", type=click.Choice(DTYPES), help="Activations and arithmetic.  [default: the model's]"),
        size_options,
    )
    for option in reversed(options):
        command = option(command)
    return command


def taken(options: dict[str, Any], models: Sequence[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """(sizes of `random:llava`, arguments of `foveate.cost`) from a command's options, what was given of them.

    Raises UseError for a size of `random:llava` where none of the models is that.
    """
    sizes = given_sizes(options)
    own = [name for name in sizes if name != "visual_tokens"]
    if own and RANDOM not in models:
        raise UseError(f"{SIZES[own[0]][0]} is a size of {RANDOM}; {' and '.join(models)} has its own")
    amounts: Mapping[str, Any] = {"visual_tokens": sizes.get("visual_tokens"), **options}
    return sizes, {name: value for name, value in amounts.items() if value is not None}
