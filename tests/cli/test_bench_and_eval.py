"""`foveate bench` and `foveate eval`: the JSON that others rely on, the tables, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate import bench as bench_module
from foveate.bench import Bench, Timing, bench
from foveate.errors import InputError
from foveate.ir.cost import Cost
from foveate.ir.cost.work import Work
from foveate.machine import thread_count
from foveate.models.random import random_llava
from tests.cli.conftest import Run

SIZES = ("--layers", 2, "--hidden", 64, "--heads", 4, "--ffn", 96, "--visual-tokens", 16, "--text-tokens", 8)
FEW = ("--threads", 1, "--repeat", 2, "--new-tokens", 2)


@pytest.mark.slow
def test_bench_json_holds_the_contract(run: Run) -> None:
    result = run("bench", "random:llava", "-p", "cut-visual{from_layer=1}", *SIZES, *FEW, "--batch", 2, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    dense, optimized, hf = told["dense"], told["optimized"], told["hf"]
    for times in (dense, optimized, hf):
        assert times["prefill_s"] > 0 and times["decode_s"] > 0
        assert len(times["prefills_s"]) == 2
    assert told["prefill_speedup"] == pytest.approx(dense["prefill_s"] / optimized["prefill_s"])
    assert told["decode_speedup"] == pytest.approx(dense["decode_s"] / optimized["decode_s"])
    assert told["prefill_speedup_vs_hf"] == pytest.approx(hf["prefill_s"] / optimized["prefill_s"])
    assert told["flop_speedup"] == pytest.approx(dense["flops"] / optimized["flops"])
    assert told["efficiency"] == pytest.approx(told["prefill_speedup"] / told["flop_speedup"])
    assert told["flop_speedup"] > 1
    assert dense["kv_bytes"] > optimized["kv_bytes"]
    assert told["dense_error"] < 1e-4
    assert (told["threads"], told["batch"], told["visual_tokens"], told["text_tokens"]) == (1, 2, 16, 8)


def test_bench_table_fits_80_columns_and_tells_a_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Cost(*(Work(10**9, 10**6, time_s=0.01) for _ in range(3)), kv_bytes=2048, peak_bytes=4096, parameters=5)
    times = {
        "dense": Timing([0.1, 0.2, 0.3], [0.01]),
        "optimized": Timing([0.4], [0.005]),
        "hf": Timing([0.8], [0.004]),
    }
    setting = {
        "passes": "fastv",
        "backend": "eager",
        "dtype": "float32",
        "threads": 2,
        "batch": 1,
        "visual_tokens": 16,
        "text_tokens": 8,
        "repeat": 3,
    }
    made = Bench(setting, times, {"dense": spent, "optimized": spent}, 0.001, 0.0)
    monkeypatch.setattr(bench_module, "bench", lambda *args, **options: made)
    result = run("bench", "random:llava", "-p", "fastv", *SIZES)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "SLOWER: prefill is slower than dense: 0.50x" in result.stdout
    assert "SLOWER: decode is slower than Hugging Face: 0.80x" in result.stdout
    assert "decode is slower than dense" not in result.stdout
    assert made.to_json()["prefill_speedup"] == 0.5


@pytest.mark.slow
def test_bench_puts_threads_and_attention_back() -> None:
    model = random_llava(layers=1)
    model.set_attn_implementation("eager")
    before = torch.get_num_threads()
    bench(model, None, threads=before + 1, repeat=1, new_tokens=1, text_tokens=4)
    assert torch.get_num_threads() == before
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ZeroDivisionError), thread_count(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text-tokens", 2), "text_tokens must be at least"),
        (("--text-tokens", 5000), "this model takes 4096"),
        (("--hidden", 65), "multiple of 2 * heads"),
    ],
)
def test_bench_refuses_sizes(run: Run, options: tuple[object, ...], said: str) -> None:
    result = run("bench", "random:llava", "-p", "", *SIZES, *options, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_prompts_too_long_are_an_input_error() -> None:
    with pytest.raises(InputError, match="4096"):
        bench(random_llava(layers=1), None, text_tokens=8, new_tokens=4096)


def test_eval_json_holds_the_contract(run: Run, folder: Path) -> None:
    result = run("eval", folder, "-p", "", "--task", "mixed", "-n", 5, "--batch", 2, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["task"] == "mixed"
    for name in ("dense", "optimized"):
        assert told[name]["n"] == 5
        assert 0 <= told[name]["accuracy"] <= 1
    assert list(told["dense"]["by_task"]) == ["count", "lookup", "row"]
    assert told["agreement"] == 1.0, "no pass, so every answer must be the same"
    assert told["dense"] == told["optimized"]


def test_eval_table(run: Run, folder: Path) -> None:
    result = run("eval", folder, "-p", "cut-visual{from_layer=1}", "--task", "lookup", "-n", 2)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "accuracy" in result.stdout and "lookup" in result.stdout


def test_eval_needs_a_processor(run: Run) -> None:
    result = run("eval", "random:llava", "-p", "")
    assert result.exit_code == 2
    assert "no processor" in result.stderr
