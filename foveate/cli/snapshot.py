"""`foveate snapshot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from foveate.cli.amounts import amount_options, taken
from foveate.cli.options import PASSES, json_option
from foveate.cli.output import talking
from foveate.ir.collector import collector_paused


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
    from foveate.cli.programs import load_program
    from foveate.files import write_whole

    with collector_paused(), talking(as_json) as out:
        sizes, amounts = taken(options, (model,))
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
