"""`foveate optimize`."""

from __future__ import annotations

from typing import Any

import click

from foveate.cli.options import backend_option, given_sizes, json_option, passes_option, size_options
from foveate.cli.output import talking


@click.command("optimize")
@click.argument("model")
@passes_option
@click.option("-o", "--output", "folder", required=True, metavar="DIR", help="A folder that does not exist yet.")
@backend_option
@size_options
@json_option
def command(model: str, passes: str, folder: str, backend: str, as_json: bool, **options: Any) -> None:
    """Optimize MODEL and save it, with its processor, in the new folder DIR.

    MODEL is "digits", a folder, a hub id, or "random:llava". Load DIR with `foveate run` or `foveate.load`.
    """
    from foveate.cli.folders import new_folder
    from foveate.cli.models import load_model
    from foveate.passes.pipeline import resolve

    with talking(as_json) as out:
        chosen = resolve(passes)
        with new_folder(folder) as part:
            out.tick("loading the model", 0, 3)
            loaded = load_model(model, given_sizes(options))
            import foveate
            from foveate.cli.errors import UseError

            out.tick("optimizing", 1, 3)
            optimized = foveate.optimize(loaded.model, chosen, backend=backend)
            out.tick("saving", 2, 3)
            optimized.save_pretrained(part)
            try:
                loaded.get_processor().save_pretrained(part)
                has_processor = True
            except UseError as error:
                out.note(f"no processor is saved, so `foveate run` will not work here: {error}")
                has_processor = False
        report = optimized.report()
        out.say(str(report))
        out.line(f"saved in {folder}")
        out.finish({"folder": folder, "processor": has_processor, "backend": backend, "report": report.to_json()})
