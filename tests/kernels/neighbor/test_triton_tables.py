"""Tables of images, patches and runs; which inputs and devices the Triton form takes, with and without Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.neighbor.tables import KEPT, Grids, grid_rows, image_table, run_table, text_end, tile_table
from foveate.kernels.neighbor.triton_configs import backward_configs, forward_config, text_run
from foveate.kernels.neighbor.triton_support import LONGEST_SIDE, available, supports

CPU = torch.device("cpu")
TWO = ((1, 0, 3, 5, 0, 4), (0, 0, 2, 2, 1, 1))


@st.composite
def grids(draw: st.DrawFn) -> Grids:
    """Images of up to three batch rows, in any order of these, one behind the other within each."""
    rows: list[tuple[int, ...]] = []
    ends = dict.fromkeys(range(3), 0)
    for _ in range(draw(st.integers(0, 5))):
        batch, height, width = draw(st.integers(0, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
        rows.append((batch, ends[batch], height, width, 0, draw(st.integers(0, 7))))
        ends[batch] += height * width
    return tuple(rows)


@settings(deadline=None, max_examples=50)
@given(grids=grids(), rows=st.sampled_from([1, 2, 8]), cols=st.sampled_from([1, 4, 8]))
def test_patches_cover_every_token_once(grids: Grids, rows: int, cols: int) -> None:
    covered = [
        (image, row, col)
        for image, top, left, _ in tile_table(grids, rows, cols, CPU).tolist()
        for row in range(top, min(top + rows, grids[image][2]))
        for col in range(left, min(left + cols, grids[image][3]))
    ]
    every = [(i, r, c) for i, grid in enumerate(grids) for r in range(grid[2]) for c in range(grid[3])]
    assert sorted(covered) == every


@settings(deadline=None, max_examples=50)
@given(grids=grids(), run=st.integers(1, 30))
def test_runs_cover_every_token_once_in_their_batch_row(grids: Grids, run: int) -> None:
    table, of_batch = run_table(grids, run, CPU)
    assert set(of_batch) == {grid[0] for grid in grids}
    for batch, part in of_batch.items():
        tokens = [(i, t) for i, first, count, _ in table[part].tolist() for t in range(first, first + count)]
        assert tokens == [(i, t) for i, g in enumerate(grids) if g[0] == batch for t in range(g[2] * g[3])]
        assert all(0 < count <= run for _, _, count, _ in table[part].tolist())
    assert sum(part.stop - part.start for part in of_batch.values()) == len(table)


def test_image_table_and_text() -> None:
    assert image_table(TWO, CPU).tolist() == [[1, 0, 3, 5, 0, 4, 0, 0], [0, 0, 2, 2, 1, 1, 0, 0]]
    assert image_table(TWO, CPU).dtype == torch.int32
    assert image_table((), CPU).shape == (0, 8)
    assert text_end(TWO) == 4
    assert text_end(((0, 0, 1, 1, 3, 3),)) == text_end(()) == 0, "an empty range is not seen, wherever it ends"


def test_tables_are_made_once_and_few_are_kept() -> None:
    rows = grid_rows(torch.tensor(TWO))
    assert tile_table(rows, 8, 8, CPU) is tile_table(TWO, 8, 8, CPU)
    for side in range(KEPT + 9):
        tile_table(((0, 0, 1, side + 1, 0, 0),), 8, 8, CPU)
    assert tile_table.cache_info().currsize <= KEPT


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_sizes_fill_the_warps(group: int, element_size: int) -> None:
    for radius in (1, 2, 3, 9):
        config = forward_config(group, radius, element_size)
        rows = config.rows * config.cols * group
        assert rows in ((16,) if element_size == 4 else (64, 128))
        assert element_size == 4 or config.warps * 16 == rows
    for capability in (80, 90, 100):
        assert backward_configs(capability, group, element_size).dq.rows > 0


def test_runs_of_long_videos_grow_so_that_shares_stay_few() -> None:
    assert text_run(576, 32) == 256
    assert 500 <= -(-(16384 * 32) // text_run(16384, 32)) <= 512


@pytest.mark.parametrize("off", [-2, 0, 2])
def test_halo_rows_are_told_exactly_up_to_the_longest_side(off: int) -> None:
    """Division as in `triton_shared.halo_place`, with a reciprocal that is off by so many units in the last place."""
    width = torch.arange(1, LONGEST_SIDE + 1)[:, None]
    bits = (1.0 / width.float()).view(torch.int32) + off
    row = torch.arange(0, LONGEST_SIDE + 1)[None, :]
    for slot in (row * width, (row + 1) * width - 1):
        told = ((slot.float() + 0.5) * bits.view(torch.float32)).int()
        assert torch.equal(told.long(), row.expand_as(told))


def inputs(heads: int = 4, key_heads: int = 2, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.empty(1, h, 15, size, dtype=dtype, device="meta") for h in (heads, key_heads, key_heads)]


def test_what_is_taken_and_what_is_refused_with_a_reason() -> None:
    grid = torch.tensor([[0, 0, 3, 5, 0, 4]])
    q, k, text = inputs()
    wide = torch.empty(1, 2, 2**25, 64, device="meta").expand(3, 2, 2**25, 64)
    assert supports(q, k, text, grid, "chebyshev") is supports(q, k, None, grid[:0], "euclidean") is None
    assert supports(*inputs(28, 4, 96, torch.float16), grid, "euclidean") is None
    refused = {
        "metric is raster": (q, k, text, grid, "raster"),
        "q is torch.float64": (*inputs(dtype=torch.float64), grid, "chebyshev"),
        "32 query heads share a key head": (*inputs(64, 2), grid, "chebyshev"),
        "head size is 256": (*inputs(size=256), grid, "chebyshev"),
        "head size is 8": (*inputs(size=8), grid, "chebyshev"),
        "an image is 5000 tokens long": (q, k, text, torch.tensor([[0, 0, 1, 5000, 0, 0]]), "chebyshev"),
        "a batch row of the text's k spans": (q, k, wide, grid, "chebyshev"),
    }
    for reason, arguments in refused.items():
        assert reason in str(supports(*arguments))


def test_without_triton_the_form_says_so_and_nothing_breaks() -> None:
    modules = ("offline", "tables", "triton_configs", "triton_launch", "triton_problem", "triton_support")
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        + ";".join(f"import foveate.kernels.neighbor.{name}" for name in modules)
        + "; print(foveate.kernels.neighbor.triton_support.available(torch.device('cuda', 0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_a_cpu_can_run_it_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(CPU)
