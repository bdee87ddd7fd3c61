"""`foveate snapshot`, and the options that it shares with `foveate diff`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from foveate.cli.options import F, given_sizes, json_option, size_options
from foveate.cli.output import talking

DTYPES = ("float32", "bfloat16", "float16", "float8", "int8", "int4")
AT_LEAST_ONE = click.IntRange(min=1)

PASSES = 'Passes, as in "cut-visual{from_layer=6}"; recipe:NAME; a YAML file.'


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


def taken(options: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """(sizes of `random:llava`, arguments of `foveate.cost`) from a command's options, what was given of them."""
    sizes = given_sizes(options)
    amounts = {"visual_tokens": sizes.get("visual_tokens"), **options}
    return sizes, {name: value for name, value in amounts.items() if value is not None}


def check_sizes(models: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    """UseError for a size of `random:llava` where none of the models is that."""
    from foveate.cli.errors import UseError
    from foveate.cli.models import RANDOM
    from foveate.cli.options import SIZES

    own = [name for name in sizes if name != "visual_tokens"]
    if own and RANDOM not in models:
        raise UseError(f"{SIZES[own[0]][0]} is a size of {RANDOM}; {models[0]} has its own")


@click.command("snapshot")
@click.argument("model")
@click.option("--passes", "-p", default="", metavar="P", help=PASSES)
@click.option("-o", "--output", "file", metavar="FILE.json", help="Where to write it.  [default: stdout]")
@amount_options
@json_option
def command(model: str, passes: str, file: str | None, as_json: bool, **options: Any) -> None:
    """Write a stable picture of MODEL's graphs after passes, to be committed and compared.

    MODEL is a shipped configuration such as llava-1.5-7b, "digits", "random:llava", a folder or a hub id. The same
    program gives the same bytes on every machine. An older snapshot in FILE.json is replaced, nothing else is.
    """
    from foveate.cli.folders import write_whole
    from foveate.cli.programs import load_program

    sizes, amounts = taken(options)
    with talking(as_json) as out:
        check_sizes((model,), sizes)
        path = None if file is None else _target(file)
        out.tick("tracing", 0, 2)
        name, program = load_program(model, passes, options["dtype"], sizes)
        from foveate.ir.snapshot.make import snapshot

        out.tick("writing down", 1, 2)
        made = snapshot(program, name=name, **amounts)
        text = made.to_text()
        out.tick("writing down", 2, 2)
        if path is None:
            out.line(text.removesuffix("\n"))
        else:
            write_whole(path, text.encode())
            out.line(f"{len(text.encode())} bytes in {file}")
        data = made.data
        out.finish({"file": file, "bytes": len(text.encode()), "layers": data["model"]["layers"], "cost": data["cost"]})


def _target(file: str) -> Path:
    """Where to write; UseError before the work where something is in the way."""
    from foveate.cli.errors import UseError
    from foveate.cli.folders import check_file
    from foveate.errors import ArtifactError
    from foveate.ir.snapshot import read_snapshot

    path = check_file(file, ".json")
    if path.exists():
        try:
            read_snapshot(path)
        except ArtifactError as error:
            raise UseError(f"{file} exists and is not replaced: {error}") from None
    return path
