"""`foveate passes`."""

from __future__ import annotations

import dataclasses
import json

from foveate.passes.pipeline import PASSES
from tests.cli.conftest import Run


def test_json_lists_every_pass_with_its_options(run: Run) -> None:
    result = run("passes", "--json")
    found = {entry["name"]: entry for entry in json.loads(result.stdout)["passes"]}
    assert list(found) == list(PASSES)
    for name, cls in PASSES.items():
        assert [o["name"] for o in found[name]["options"]] == [f.name for f in dataclasses.fields(cls)]
        assert found[name]["source"] == cls.source
        assert found[name]["summary"]
    options = {o["name"]: o for o in found["fastv"]["options"]}
    assert (options["layer"]["default"], options["keep"]["default"]) == (2, 0.5)
    radius = found["neighbor-attention"]["options"][0]
    assert (radius["name"], radius["required"]) == ("radius", True)
    assert result.stderr == ""


def test_the_table_fits_80_columns(run: Run) -> None:
    lines = run("passes").stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    text = "\n".join(lines)
    for expected in ("drop-visual-neurons", "radius (required)", "keep=0.5", "arXiv 2403.06764"):
        assert expected in text
