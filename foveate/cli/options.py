"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("eager", "inductor", "onnx", "aoti")
DTYPES = ("float32", "bfloat16", "float16")
AT_LEAST_ONE = click.IntRange(min=1)

PASSES = 'Passes, as in "fastv{layer=2,keep=0.5},cut-visual{from_layer=6}"; recipe:NAME; a YAML file.'

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")

passes_option = click.option("--passes", "-p", required=True, metavar="P", help=PASSES)

backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="eager", show_default=True, help="What runs the graphs."
)

own_backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="What runs the graphs. [default: what `foveate export` wrote it for, else eager]",
)

SIZES: dict[str, tuple[str, int | None, str]] = {
    "layers": ("--layers", 12, "Decoder layers."),
    "hidden": ("--hidden", 1024, "Hidden size."),
    "heads": ("--heads", 16, "Query heads."),
    "kv_heads": ("--kv-heads", None, "Key heads; as many as query heads if not given."),
    "ffn": ("--ffn", 2816, "FFN neurons."),
    "visual_tokens": ("--visual-tokens", 576, "Tokens of one image, a square number."),
}
"""Sizes of `random:llava`: argument -> option, default, help."""


def size_options(command: F) -> F:
    """The sizes of `random:llava`; each is None where it was not given."""
    for name, (option, default, text) in reversed(SIZES.items()):
        shown = f" [default: {default}]" if default else ""
        command = click.option(option, name, type=AT_LEAST_ONE, default=None, help=f"random:llava: {text}{shown}")(
            command
        )
    return command


def given_sizes(options: dict[str, Any]) -> dict[str, int]:
    """Take the sizes that were given out of a command's options."""
    sizes = {name: options.pop(name) for name in SIZES}
    return {name: value for name, value in sizes.items() if value is not None}
