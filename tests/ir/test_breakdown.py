"""Parts of a cost, number formats and devices: parts add up, and every knob moves what it should."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from foveate.errors import InputError
from foveate.ir.cost import breakdown, cost_of, default_device
from foveate.ir.cost.devices import Device
from foveate.ir.cost.work import Work
from foveate.ir.program import layer_kv
from tests.ir.programs import FFN, HEADS, KV_HEADS, LAYERS, PIPELINES, TOKENS, pruned, traced

SIZES: dict[str, Any] = {"text_tokens": 20, "batch": 2, "past_tokens": 30}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("by", [("layer",), ("role",), ("stream",), ("layer", "role", "stream")])
def test_parts_add_up_to_the_whole(pipeline: str, by: tuple[str, ...]) -> None:
    program = pruned(pipeline)
    spent, parts = cost_of(program, **SIZES), breakdown(program, by, **SIZES)
    for graph in ("vision", "prefill", "decode"):
        whole, found = getattr(spent, graph), sum((p.work for p in parts[graph]), Work())
        assert found.time_s == pytest.approx(whole.time_s)
        assert abs(found.flops - whole.flops) <= len(parts[graph])  # shares are rounded
        assert abs(found.bytes - whole.bytes) <= 3 * len(parts[graph])


def test_streams_share_a_joined_op_by_their_tokens() -> None:
    parts = {p.stream: p.work.flops for p in breakdown(traced(HEADS)[1], ["stream"], text_tokens=20)["prefill"]}
    linears = 2 * (4 * 32 * 32 + 3 * 32 * FFN)
    attention = 4 * 32 * (TOKENS + 20) * TOKENS
    last = TOKENS * 2 * 2 * 32 * 32
    assert parts["visual"] == pytest.approx((LAYERS - 1) * (TOKENS * linears + attention) + last, rel=1e-6)


def test_after_a_cut_no_visual_work_is_left() -> None:
    parts = breakdown(pruned("cut-visual{from_layer=1}"), ["layer", "stream"])["prefill"]
    visual = {p.layer for p in parts if p.stream == "visual" and p.work.flops}
    assert visual == {0}


def test_a_breakdown_is_by_what_there_is() -> None:
    with pytest.raises(InputError, match="by layer, role, stream, or several of them; got colour"):
        breakdown(traced()[1], ["colour"])
    with pytest.raises(InputError, match="got nothing"):
        breakdown(traced()[1], [])


def test_half_precision_halves_what_moves() -> None:
    """All but indices and rotary angles, which stay as wide as they are."""
    wide, narrow = (cost_of(traced()[1], dtype=d) for d in ("float32", "bfloat16"))
    assert narrow.prefill.flops == wide.prefill.flops
    assert narrow.kv_bytes * 2 == wide.kv_bytes
    assert 0.5 <= narrow.prefill.bytes / wide.prefill.bytes < 0.52
    assert 0.5 <= narrow.peak_bytes / wide.peak_bytes < 0.52


@pytest.mark.parametrize(("option", "moved"), [("weight_bits", "weight_bytes"), ("kv_bits", "kv_bytes")])
def test_bits_of_weights_and_cache_move_alone(option: str, moved: str) -> None:
    plain, few = (cost_of(traced()[1], dtype="bfloat16", **options).decode for options in ({}, {option: 4}))
    for kind in ("weight_bytes", "activation_bytes", "kv_bytes"):
        before, after = getattr(plain, kind), getattr(few, kind)
        if kind == moved:
            assert after == pytest.approx(before / 4, rel=0.05)
        else:
            assert after == before


def test_few_bits_of_weights_leave_norms_alone() -> None:
    program = traced()[1]
    used = [w for name, w in program.weights.items() if name in program.used_weights()]
    matrices = sum(w.numel() for w in used if w.dim() > 1 and w.is_floating_point())
    saved = cost_of(program, dtype="bfloat16").peak_bytes - cost_of(program, dtype="bfloat16", weight_bits=4).peak_bytes
    assert saved == pytest.approx(matrices * 12 / 8, rel=1e-3)


def test_an_answer_fills_the_cache() -> None:
    program = traced()[1]
    without, with_ = (cost_of(program, text_tokens=10, new_tokens=n) for n in (0, 100))
    assert with_.kv_bytes - without.kv_bytes == 100 * LAYERS * 2 * KV_HEADS * 8 * 4
    assert with_.prefill == without.prefill
    middle = cost_of(program, text_tokens=10, past_tokens=60)
    assert with_.decode == middle.decode


def test_a_slow_op_is_overhead() -> None:
    device = Device("d", {"float32": 1e15}, 1e15, op_s=1.0)
    spent = cost_of(traced()[1], device=device)
    assert spent.prefill.bound == "overhead"
    assert spent.prefill.time_s == pytest.approx(round(spent.prefill.time_s))


@pytest.mark.parametrize(("rate", "bandwidth", "bound"), [(1.0, 1e15, "compute"), (1e18, 1.0, "memory")])
def test_what_binds(rate: float, bandwidth: float, bound: str) -> None:
    assert cost_of(traced()[1], device=Device("d", {"float32": rate}, bandwidth)).prefill.bound == bound


def test_fused_ops_move_less_and_compute_the_same() -> None:
    plain, fused = (
        cost_of(traced()[1], device=Device("d", {"float32": 1e11}, 1e10, fused=f)).prefill for f in (False, True)
    )
    assert fused.flops == plain.flops
    assert fused.weight_bytes == plain.weight_bytes
    assert fused.kv_bytes == plain.kv_bytes
    assert 0.2 < fused.activation_bytes / plain.activation_bytes < 0.7


def test_a_causal_call_takes_half_the_time_of_its_square() -> None:
    """Only attention costs time here."""
    tokens = 4096
    program = traced()[1]
    spent = cost_of(program, visual_tokens=tokens, text_tokens=64, device=Device("d", {"float32": 1.0}, 1e30))
    parts = breakdown(program, ["role"], visual_tokens=tokens, text_tokens=64, device="cpu")["prefill"]
    attention = next(p.work for p in parts if p.role == "self_attn")
    # One token of the last layer sees everything; the layers before compute half of what they span.
    spanned = 4 * 32 * (tokens + 64)
    assert attention.flops == (LAYERS - 1) * spanned * (tokens + 64) + spanned
    assert spent.prefill.time_s < spent.prefill.flops - 0.49 * (LAYERS - 1) * spanned * tokens


def test_keys_and_values_are_told_apart_from_other_activations() -> None:
    program = traced()[1]
    spent = cost_of(program, text_tokens=20, dtype="float32")
    stored = sum(
        1 for layer in layer_kv(program.prefill) for n in (*layer.text, *(layer.visual or ())) if isinstance(n, fx.Node)
    )
    assert stored == 4 * LAYERS
    assert spent.prefill.kv_bytes >= 2 * spent.kv_bytes, "written once and read at least once"


def test_the_device_of_a_report_follows_the_weights() -> None:
    assert default_device(traced()[1]) == "cpu"
