"""Forecasts: speed-ups, remarks on recipes that gain nothing, and the picture."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from foveate.ir.cost.devices import Device
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from foveate.report.forecast import BATCHES, ForecastReport, forecast_report
from tests.ir.programs import llava, pruned, traced

CUT = "cut-visual{from_layer=1}"
NOMINAL = Device("nominal", {"float32": 1e11}, 2e10)


def report(*pipelines: str, device: Device = NOMINAL, **sizes: Any) -> ForecastReport:
    recipes = {name: pruned(name) for name in pipelines}
    sizes = {"visual_tokens": 64, "text_tokens": 20, **sizes}
    return forecast_report(traced()[1], recipes, setting={"model": "tiny"}, device=device, **sizes)


def test_the_json_holds_the_contract() -> None:
    told = report(CUT, "fastv{layer=1,keep=0.5}").to_json()
    assert {"dense", "optimized", "speedup", "visual_tokens"} <= set(told)
    for cost in (told["dense"], told["optimized"]):
        assert {"vision", "prefill", "decode", "kv_bytes", "peak_bytes"} <= set(cost)
    flops = told["dense"]["prefill"]["flops"] / told["optimized"]["prefill"]["flops"]
    assert told["speedup"]["prefill_flops"] == flops > 1
    time = told["dense"]["prefill"]["time_s"] / told["optimized"]["prefill"]["time_s"]
    assert told["speedup"]["prefill_time"] == time > 1
    assert told["optimized"] == told["recipes"][0]["cost"]
    assert [entry["passes"] for entry in told["recipes"]] == [CUT, "fastv{layer=1,keep=0.5}"]
    assert [entry["batch"] for entry in told["recipes"][0]["by_batch"]] == list(BATCHES)


def test_without_recipes_optimized_is_dense() -> None:
    told = report().to_json()
    assert told["optimized"] == told["dense"]
    assert set(told["speedup"].values()) == {1.0}
    assert told["warnings"] == []


def test_decoding_gains_with_the_batch() -> None:
    found = report(CUT)
    gains = [gain["decode_time"] for gain in found.gains(found.recipes[0]).values()]
    assert all(gain is not None for gain in gains)
    assert gains == sorted(gains, key=lambda gain: gain or 0)


def reasons(pipeline: str, **options: Any) -> str:
    found = report(pipeline, **options)
    return " ".join(found.warnings())


def test_a_recipe_that_gains_is_not_warned_of() -> None:
    assert reasons(CUT) == ""


def test_a_recipe_that_removes_hardly_anything() -> None:
    said = reasons("random-prune{layer=1,keep=0.999}")
    assert "A: predicted 0.98x to the first token, slower than dense" in said
    assert "of the prefill FLOPs" in said


def test_weights_that_text_reads_anyway() -> None:
    """Memory is all that counts here, and a wide model's weights are most of what moves."""
    dense = trace_program(llava(hidden=256, ffn=704, device="meta"))
    found = forecast_report(
        dense,
        {CUT: apply_pipeline(dense.copy(), CUT)},
        setting={"model": "wide"},
        device=Device("d", {"float32": 1e18}, 1e9, fused=True),
        visual_tokens=4,
        text_tokens=16,
    )
    said = " ".join(found.warnings())
    assert "text tokens read every weight anyway" in said


def test_a_selection_that_costs_more_than_it_saves() -> None:
    slow = Device("d", {"float32": 1e14}, 1e13, op_s=1e-3)
    said = reasons("fastv{layer=1,keep=0.5}", device=slow)
    assert "selecting costs" in said
    assert "what each op takes besides its work" in said


def test_a_vision_tower_that_takes_all_the_time() -> None:
    """With many images and few tokens each, the tower is what runs."""
    found = forecast_report(
        traced()[1],
        {CUT: pruned(CUT)},
        setting={"model": "tiny"},
        device=NOMINAL,
        visual_tokens=1,
        text_tokens=2,
        images=50,
    )
    said = " ".join(found.warnings())
    assert "the vision tower takes" in said


def test_what_does_not_fit_is_told() -> None:
    said = reasons(CUT, device=Device("tiny box", {"float32": 1e11}, 2e10, memory_bytes=1000))
    assert "dense: needs" in said and "A: needs" in said and "tiny box has 1000 B" in said


def test_the_picture_is_a_png_with_a_row_for_each_program() -> None:
    pytest.importorskip("matplotlib")
    from foveate.report.plot import forecast_png

    one, two = (Image.open(io.BytesIO(forecast_png(report(*names)))) for names in ((), (CUT,)))
    assert one.format == two.format == "PNG"
    assert two.height > one.height
    assert len(two.convert("RGB").getcolors(10**6) or []) > 10


def test_labels_after_the_alphabet() -> None:
    found = report()
    many = ForecastReport(found.setting, found.dense, [found.dense] * 27)
    assert many.labels[:3] == ["dense", "A", "B"]
    assert many.labels[-1] == "#27"
