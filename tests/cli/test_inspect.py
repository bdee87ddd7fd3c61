"""`foveate inspect`: files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

from foveate.report.inspect import figure_data
from tests.cli.conftest import Run
from tests.ir.programs import made_up_statistics


def test_the_command_writes_pictures_and_numbers(run: Run, tmp_path: Path) -> None:
    found = made_up_statistics()
    stats, folder = tmp_path / "x.safetensors", tmp_path / "pictures"
    found.save(stats)
    for _ in range(2):
        result = run("inspect", stats, "-o", folder, "--json")
        assert result.exit_code == 0, result.stderr
    assert sorted(json.loads(result.stdout)["files"]) == sorted(p.name for p in folder.iterdir())
    assert json.loads((folder / "figures.json").read_text()) == figure_data(found)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for args, message in (
        ((stats, "-o", tmp_path / "other"), "holds other files"),
        ((tmp_path / "gone", "-o", folder), "cannot be read: there is no such file"),
    ):
        result = run("inspect", *args)
        assert result.exit_code == 2 and message in result.stderr
