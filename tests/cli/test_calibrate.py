"""`foveate calibrate`: samples from folders and JSON lines, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.ir.statistics import Statistics
from foveate.models.digits import samples
from tests.cli.conftest import Run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images, one with a question beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, sample in enumerate(samples(n=2)):
        sample.image.save(folder / f"{number}.png")
    (folder / "1.txt").write_text("how many 3 ?\n")
    (folder / "notes.md").write_text("not an image")
    return folder


def test_digits_json(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    result = run("calibrate", folder, "--data", "digits", "-n", 3, "--batch", 2, "-o", path, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    found = Statistics.load(path)
    assert (told["samples"], found.samples, len(told["layers"])) == (3, 3, 2)
    assert found.source["model"] == str(folder)
    for layer, row in enumerate(told["layers"]):
        assert row["active_heads"] == int(found.active(0.1)[layer].sum())
        assert 0 < row["text_to_visual"] < 1
        assert row["cut_kl"] == float(found.cut_kl[layer] / 3)


@pytest.mark.slow
def test_tokens_for_fitprune(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    result = run("calibrate", folder, "--data", "digits", "-n", 3, "--tokens", "-o", path)
    assert result.exit_code == 0, result.stderr
    assert Statistics.load(path).visual.tolist() == [144] * 3
    result = run("cost", folder, "--passes", f"fitprune{{budget=0.5,stats={path}}}", "--json")
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
def test_a_folder_and_json_lines_of_the_same_samples_give_the_same(run: Run, folder: Path, data: Path) -> None:
    lines = data.parent / "data.jsonl"
    entries = [
        {"image": "data/0.png", "prompt": "Describe this image."},
        {"images": ["data/1.png"], "prompt": "how many 3 ?"},
    ]
    lines.write_text("\n\n".join(json.dumps(entry) for entry in entries))
    found = []
    for name, given in (("a", data), ("b", lines)):
        path = data.parent / f"{name}.safetensors"
        result = run("calibrate", folder, "--data", given, "-o", path)
        assert result.exit_code == 0, result.stderr
        assert "2 samples" in " ".join(result.stdout.split())
        found.append(Statistics.load(path).mass)
    assert found[0].equal(found[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "data/0.png"', "data.jsonl, line 2: not JSON"),
        ('{"image": "data/0.png"}', "data.jsonl, line 2: 'prompt' is missing"),
        ('{"prompt": "a"}', "data.jsonl, line 2: the prompt has no image"),
        ('{"image": "gone.png", "prompt": "a"}', "data.jsonl, line 2: there is no image"),
        ('{"image": "data/notes.md", "prompt": "a"}', "data.jsonl, line 2:"),
        ('{"image": "data/0.png", "prompt": "<image> <image> a"}', "data.jsonl, line 2: the prompt holds 2 <image>"),
    ],
)
def test_a_bad_line_is_named(run: Run, folder: Path, data: Path, line: str, message: str) -> None:
    lines = data.parent / "data.jsonl"
    lines.write_text('{"image": "data/0.png", "prompt": "a"}\n' + line)
    result = run("calibrate", folder, "--data", lines, "-o", data.parent / "x.safetensors")
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_wrong_use_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, message in (
        (("--data", "digits", "-o", tmp_path / "x.pt"), "must end in .safetensors"),
        (("--data", tmp_path / "gone", "-o", path), "there is no such file or folder"),
        (("--data", empty, "-o", path), "holds 0 images"),
    ):
        result = run("calibrate", folder, *args)
        assert result.exit_code == 2
        assert message in result.stderr.splitlines()[-1]
    assert not path.exists()
