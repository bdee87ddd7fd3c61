"""The pass report, the figures in it, and masks of kept tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foveate
from foveate.errors import FoveateWarning
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from foveate.report.figures import count, ms, percent, size, times
from foveate.report.kept import kept_masks, kept_places
from foveate.report.passes import report


@pytest.fixture(scope="module")
def opt() -> OptimizedModel:
    with pytest.warns(FoveateWarning):
        passes = "fastv{layer=1},fastv{layer=2,keep=1.0},cut-visual{from_layer=2}"
        return foveate.optimize(random_llava(layers=3), passes)


def test_each_pass_has_its_text_notes_and_effect(opt: OptimizedModel) -> None:
    text = str(opt.report())
    assert "1. fastv{layer=1}" in text
    assert "floor(0.5 x visual tokens) kept" in text
    assert "2. fastv{keep=1.0}\n   changed nothing: keep=1 keeps every visual token" in text
    assert "3. cut-visual{from_layer=2}" in text
    assert "prefill FLOPs" in text and "KV cache" in text


@pytest.mark.parametrize("width", [40, 80])
def test_lines_fit_the_width(opt: OptimizedModel, width: int) -> None:
    assert max(map(len, report(opt.program).to_text(width).splitlines())) <= width


def test_json_is_plain_data(opt: OptimizedModel) -> None:
    told = json.loads(json.dumps(report(opt.program, text_tokens=7).to_json(), allow_nan=False))
    assert [entry["text"] for entry in told["passes"]] == [r.text for r in opt.program.passes]
    assert [entry["skipped"] is None for entry in told["passes"]] == [True, False, True]
    first, _, last = told["passes"]
    before, after = first["cost"]["prefill_flops"]
    assert before > after > last["cost"]["prefill_flops"][1]
    assert told["sizes"] == {"text_tokens": 7, "device": "cpu"}
    assert told["cost"] == foveate.cost(opt.program, text_tokens=7).to_json()


def test_no_passes() -> None:
    program = foveate.trace(random_llava(layers=1))
    assert "no passes" in str(report(program))
    assert report(program).to_json()["passes"] == []


def test_a_report_survives_saving(opt: OptimizedModel, tmp_path: Path) -> None:
    opt.save_pretrained(tmp_path / "saved")
    assert str(foveate.load(tmp_path / "saved").report()) == str(opt.report())


def test_places_and_mask_of_kept_tokens(opt: OptimizedModel) -> None:
    inputs = random_inputs(random_llava(layers=1), batch=2, padding="left", prefix=2)
    kept = kept_places(opt, inputs)
    assert list(kept) == [1]
    assert [len(row) for row in kept[1]] == [8, 8]
    for row in range(2):
        own = {**inputs, "input_ids": inputs["input_ids"][row : row + 1], "pixel_values": inputs["pixel_values"][:1]}
        (mask,) = kept_masks(opt.program.info, own, kept[1][row])
        flat = [value for line in mask for value in line]
        first = int((inputs["input_ids"][row] == opt.program.info.image_token_id).nonzero()[0])
        assert [first + place for place, stays in enumerate(flat) if stays] == kept[1][row]


def test_the_mask_of_the_second_image(opt: OptimizedModel) -> None:
    inputs = random_inputs(random_llava(layers=1), images=2)
    visual = (inputs["input_ids"][0] == opt.program.info.image_token_id).nonzero().flatten().tolist()
    first, second = kept_masks(opt.program.info, inputs, [visual[16], visual[0]])
    for mask in (first, second):
        assert mask[0] == [True, False, False, False]
        assert not any(any(line) for line in mask[1:])


def test_without_selection_nothing_is_run_and_nothing_is_kept() -> None:
    dense = foveate.optimize(random_llava(layers=1))
    assert kept_places(dense, {}) == {}


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (count(0), "0"), (count(999), "999"), (count(1234), "1.23k"), (count(999_999), "1M"),
        (count(31_000_000_000), "31G"), (count(5e15), "5000T"),
        (ms(0.0123), "12.3"), (ms(1.5), "1500"), (ms(0.00012), "0.12"),
        (size(10), "10 B"), (size(1536), "1.5 KiB"), (size(300 * 2**20), "300 MiB"), (size(5 * 2**40), "5120 GiB"),
        (times(3.1), "3.10x"), (percent(0.9375), "93.8%"),
    ],
)  # fmt: skip
def test_figures(made: str, text: str) -> None:
    assert made == text
