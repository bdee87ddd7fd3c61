"""`foveate passes`."""

from __future__ import annotations

from typing import Any

import click

from foveate.cli.options import json_option
from foveate.cli.output import table, talking


@click.command("passes")
@json_option
def command(as_json: bool) -> None:
    """List the passes, their options with defaults, and where they come from."""
    from foveate.report.catalogue import catalogue

    with talking(as_json) as out:
        found = catalogue()
        shown = table(None, "pass", "options", "what it does, and its source", left=3)
        shown.show_lines = True
        for entry in found["passes"]:
            options = "\n".join(_option(option) for option in entry["options"])
            shown.add_row(entry["name"], options, f"{entry['summary']}\nSource: {entry['source']}")
        out.say(shown)
        if found["recipes"]:
            out.say("recipes: " + ", ".join(f"recipe:{name}" for name in found["recipes"]))
        out.say('A pipeline is passes in order, as in --passes "fastv{layer=2,keep=0.5},cut-visual{from_layer=6}"')
        out.finish(found)


def _option(option: dict[str, Any]) -> str:
    return f"{option['name']} (required)" if option["required"] else f"{option['name']}={option['default']}"
