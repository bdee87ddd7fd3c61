"""`foveate inspect`."""

from __future__ import annotations

import json

import click

from foveate.cli.options import json_option
from foveate.cli.output import talking

DATA = "figures.json"


@click.command("inspect")
@click.argument("stats", metavar="STATS")
@click.option(
    "-o", "--output", "folder", required=True, metavar="DIR", help="An empty or new folder, or one of before."
)
@json_option
def command(stats: str, folder: str, as_json: bool) -> None:
    """Draw what STATS, made by `foveate calibrate`, says of a model: YOPO's figures 2, 3 and 5.

    DIR gets distance.png, layers.png, heads.png, and figures.json with the numbers. Pictures need matplotlib:
    pip install "foveate[plot]"
    """
    from foveate.cli.folders import own_folder
    from foveate.files import write_whole
    from foveate.ir.statistics import Statistics
    from foveate.report.inspect import FIGURES, figure_data, figure_png
    from foveate.report.plot import check_matplotlib

    with talking(as_json) as out:
        check_matplotlib()
        data = figure_data(Statistics.load(stats))
        path = own_folder(folder, DATA)
        write_whole(path / DATA, (json.dumps(data, indent=1) + "\n").encode())
        for done, name in enumerate(FIGURES):
            out.tick("drawing", done, len(FIGURES))
            write_whole(path / f"{name}.png", figure_png(data, name))
        files = [DATA, *(f"{name}.png" for name in FIGURES)]
        out.line(f"{', '.join(files)} are in {folder}")
        out.finish({"folder": folder, "files": files, "samples": data["samples"]})
