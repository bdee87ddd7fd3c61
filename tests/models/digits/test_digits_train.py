"""The training run, in its smoke form, and its parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.models.digits import samples, weights_path
from foveate.models.digits.card import example
from foveate.models.digits.data import compose, digit_set
from foveate.models.digits.pretrain import per_cell, per_patch
from foveate.models.digits.questions import GRID
from foveate.models.digits.schedule import rate_at
from foveate.models.digits.sequences import draw_counts, draw_many, draw_one, draw_rows
from foveate.models.digits.train import main, measure


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_without_output_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = (weights_path() / "model.safetensors").stat().st_mtime_ns
    assert main(["--quick"]) == 2
    assert "--output" in capsys.readouterr().err
    assert (weights_path() / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_quick_run_writes_a_complete_folder_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    # One thread: two of them wait for each other in a spin that a busy machine makes very long.
    for folder in (first, again):
        assert main(["--quick", "--threads", "1", "--output", str(folder)]) == 0
    assert "trained in" in capsys.readouterr().out
    bundled = {path.name for path in weights_path().iterdir()}
    assert {path.name for path in first.iterdir()} == bundled
    weights = "model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    assert set(measure(first, 1)) == {"lookup", "count", "row"}


def test_the_card_shows_the_grid_of_its_example() -> None:
    card = (weights_path() / "README.md").read_text(encoding="utf-8")
    lines = [" ".join("-" if cell == "empty" else cell for cell in line) for line in example().grid]
    assert "\n".join(lines) in card
    assert "$" not in card


@pytest.mark.parametrize("seed", range(5))
def test_no_answer_of_a_sequence_can_be_copied_from_an_earlier_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, grid = compose(rng, digit_set("train"))
    questions = draw_many(rng, grid, raster=seed % 2 == 0, counts=9)
    assert [question.task == "count" for question in questions] == sorted(
        (question.task == "count" for question in questions), reverse=True
    )
    cells = [cell for question in questions if question.task != "count" for cell in question.cells(grid)]
    assert len(set(cells)) == len(cells)
    assert sum(question.task == "lookup" for question in questions) == 2 * GRID
    if seed % 2 == 0:
        assert cells == sorted(cells)


def test_rows_come_in_order_or_shuffled_and_one_question_is_one() -> None:
    rng = np.random.default_rng(0)
    grid = samples(n=1)[0].grid
    assert [question.row for question in draw_rows(rng, grid, raster=True)] == [0, 1, 2, 3]
    assert any([question.row for question in draw_rows(rng, grid, raster=False)] != [0, 1, 2, 3] for _ in range(9))
    single = [draw_one(rng, grid, raster=False) for _ in range(60)]
    assert {len(questions) for questions in single} == {1}
    assert {questions[0].task for questions in single} == {"lookup", "count", "row"}


def test_counting_questions_do_not_repeat() -> None:
    grid = samples(n=1)[0].grid
    digits = [question.digit for question in draw_counts(np.random.default_rng(0), grid, 20)]
    assert sorted(digits) == list(range(10))


def test_cells_and_patches_map_onto_each_other() -> None:
    cells = torch.arange(16.0)
    patches = per_patch(cells)
    assert patches.unflatten(0, (12, 12))[5, 7] == 6
    assert torch.equal(per_cell(patches[None, :, None])[0, :, 0], cells)


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [rate_at(step, 100, 2.0, warm=10, decay=0.4) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[50] == 2.0
    assert rates[-1] == pytest.approx(2.0 / 40)
    assert rates[60:] == sorted(rates[60:], reverse=True)
