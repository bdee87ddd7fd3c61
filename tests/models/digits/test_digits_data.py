"""The digits, their split, and the composed grids."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys

import numpy as np
import pytest

from foveate.models.digits import samples
from foveate.models.digits.data import CELL, MOST_NON_DIGITS, SIZE, STRONG, compose, digit_set, draw_labels
from foveate.models.digits.questions import EMPTY


def stored() -> dict[str, np.ndarray]:
    path = importlib.resources.files("foveate.models.digits") / "digits.npz"
    with importlib.resources.as_file(path) as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_stored_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    arrays = stored()
    np.testing.assert_array_equal(arrays["images"], original.images)
    np.testing.assert_array_equal(arrays["labels"], original.target)


def test_the_split_is_disjoint_complete_and_stratified() -> None:
    train, heldout = digit_set("train"), digit_set("heldout")
    assert len(train.labels) + len(heldout.labels) == len(stored()["labels"]) == 1797
    assert np.bincount(heldout.labels).tolist() == [40] * 10
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in heldout.images)


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, heldout"):
        digit_set("test")


@pytest.mark.parametrize("task", ["lookup", "count", "row", "mixed"])
def test_samples_repeat_for_a_seed_and_differ_between_seeds(task: str) -> None:
    first, again, other = (samples(task=task, n=6, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert [sample.image.tobytes() for sample in first] == [sample.image.tobytes() for sample in again]
    assert [sample.image.tobytes() for sample in first] != [sample.image.tobytes() for sample in other]


def test_fewer_samples_are_a_prefix_of_more() -> None:
    assert samples(n=3, seed=1) == samples(n=9, seed=1)[:3]


def test_images_are_rgb_of_the_expected_size() -> None:
    image = samples(n=1)[0].image
    assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))


def test_blank_cells_are_darker_than_digits_and_few() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.array(draw_labels(rng))
        assert (labels < 0).sum() <= MOST_NON_DIGITS
    pixels, grid = compose(np.random.default_rng(1), digit_set("train"), STRONG)
    means = {"digit": [], "blank": []}  # type: dict[str, list[float]]
    for row, line in enumerate(grid):
        for column, reading in enumerate(line):
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            means["blank" if reading == EMPTY and cell.std() < 15 else "digit"].append(float(cell.mean()))
    assert means["digit"] and min(means["digit"]) > max(means["blank"], default=0)


def test_count_questions_cover_zero_and_many() -> None:
    answers = [int(sample.answer) for sample in samples(task="count", n=300, seed=0)]
    assert min(answers) == 0 and max(answers) >= 5
    assert answers.count(0) < 120


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from foveate.models.digits import samples; samples(n=1); "
        "print([name for name in ('torch', 'transformers', 'sklearn') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
