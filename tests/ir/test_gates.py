"""Gates: what they say, when they fail, and what is said of wrong ones."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ir.diff import diff
from foveate.ir.diff.gates import Gate, check_gates, figures
from foveate.ir.snapshot.make import snapshot
from tests.ir.programs import pruned, traced

FIGURES: dict[str, tuple[float | None, float | None]] = {
    "prefill.flops": (1000, 1010),
    "kv_bytes": (200 * 2**20, 100 * 2**20),
    "none": (0, 0),
    "new": (0, 5),
    "lost": (5, 0),
    "missing": (None, 5),
    "gone": (5, None),
    "time": (0.1, 0.3),
}


@pytest.mark.parametrize(
    ("text", "ok", "value"),
    [
        ("prefill.flops>+1%", True, 0.01),
        ("prefill.flops>=+1%", False, 0.01),
        ("prefill.flops > +0.99%", False, 0.01),
        ("prefill.flops<+1%", True, 0.01),
        ("prefill.flops<=+1%", False, 0.01),
        ("prefill.flops>-5%", False, 0.01),
        ("prefill.flops>+10", True, 10),
        ("prefill.flops>=+10", False, 10),
        ("prefill.flops>+9.5", False, 10),
        ("prefill.flops<-1", True, 10),
        ("prefill.flops>1009", False, 1010),
        ("prefill.flops>1010", True, 1010),
        ("prefill.flops>1.01k", True, 1010),
        ("prefill.flops>1.009k", False, 1010),
        ("prefill.flops>1e3", False, 1010),
        ("kv_bytes>100MiB", True, 100 * 2**20),
        ("kv_bytes>=100MiB", False, 100 * 2**20),
        ("kv_bytes>100M", False, 100 * 2**20),
        ("kv_bytes<.2GiB", False, 100 * 2**20),
        ("kv_bytes>-101MiB", False, -100 * 2**20),
        ("kv_bytes<-40%", False, -0.5),
        ("kv_bytes<-50%", True, -0.5),
        ("none>+0%", True, 0.0),
        ("none>=+0%", False, 0.0),
        ("new>+1000000%", False, None),
        ("new<+1%", True, None),
        ("new>+4", False, 5),
        ("lost<-99%", False, -1.0),
        ("missing>4", False, 5),
        ("time>=+200%", True, pytest.approx(2.0)),
        ("time>+199.9%", False, pytest.approx(2.0)),
    ],
)
def test_a_gate_fails_when_it_is_true(text: str, ok: bool, value: float | None) -> None:
    result = Gate.of(text).check(FIGURES)
    assert result.ok is ok
    assert result.value == value
    plain = result.to_json()
    assert (plain["gate"], plain["value"], plain["ok"]) == (text, result.value, ok)
    assert text.startswith(plain["quantity"]) and (plain["kind"] == "relative") == text.endswith("%")
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "text",
    ["",
     "prefill", "prefill.flops", "prefill.flops>", ">+1%", "a=+1%", "a==1", "a>>1", "a>+-1", "a>1x", "a>nan", "a>inf",
     "a>1e999", "a>" + "9" * 100, "a>0x10", "a > + 1 %%", "a>1 2", "a>1,5", "a>1kB", "a>1Ki", "1a>1", "a b>1",
     "a>1;b>2"],
)  # fmt: skip
def test_wrong_text_shows_the_grammar(text: str) -> None:
    with pytest.raises(InputError, match="QUANTITY OP BOUND") as caught:
        Gate.of(text)
    assert "prefill.flops>+1%" in str(caught.value)


def test_a_percentage_needs_a_sign() -> None:
    with pytest.raises(InputError, match="needs a sign"):
        Gate.of("kv_bytes>5%")


def test_an_unknown_quantity_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"no quantity 'kv'; there are: prefill.flops, kv_bytes"):
        Gate.of("kv>1").check(FIGURES)


@pytest.mark.parametrize("text", ["missing>+1%", "missing>+1", "gone>1", "gone>+1"])
def test_a_quantity_that_one_side_lacks(text: str) -> None:
    with pytest.raises(InputError, match="is not in both snapshots"):
        Gate.of(text).check(FIGURES)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("prefill.flops>+1%", "+1%"),
        ("new>+1%", "infinite"),
        ("kv_bytes>+1", "-104,857,600"),
        ("prefill.flops>1", "1,010"),
    ],
)
def test_what_was_measured_is_readable(text: str, shown: str) -> None:
    assert Gate.of(text).check(FIGURES).measured == shown


def test_gates_of_a_diff() -> None:
    plain: dict[str, Any] = diff(
        snapshot(traced()[1], device="cpu"), snapshot(pruned("cut-visual{from_layer=1}"), device="cpu")
    ).to_json()
    known = figures(plain)
    for name in ("vision.time_s", "prefill.flops", "decode.bytes", "kv_bytes", "peak_bytes", "prefill.nodes"):
        assert name in known
    results = check_gates(["prefill.flops>+1%", "prefill.nodes>=-1", "kv_bytes<-90%"], plain)
    assert [r.ok for r in results] == [True, True, True]
    (result,) = check_gates(["prefill.flops<-1%"], plain)
    assert not result.ok and result.value == pytest.approx(plain["cost"]["prefill.flops"]["change"], rel=1e-5)
    with pytest.raises(InputError, match="QUANTITY"):
        check_gates(["prefill.flops>+1%", "nonsense"], plain)


@settings(max_examples=200, deadline=None)
@given(a=st.integers(0, 10**15), b=st.integers(0, 10**15), bound=st.integers(-500, 500), op=st.sampled_from("<>"))
def test_strict_and_weak_gates_agree_but_at_the_bound(a: int, b: int, bound: int, op: str) -> None:
    known = {"x": (float(a), float(b))}
    for unit in ("%", ""):
        strict, weak = (Gate.of(f"x{o}{bound:+d}{unit}").check(known) for o in (op, op + "="))
        relative = 100 * (b - a) == bound * a if a else b == bound == 0
        at_bound = relative if unit else b - a == bound
        assert (strict.ok != weak.ok) == at_bound


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="akM.%+-<>= 0123456789eGiB_\n", max_size=12))
def test_any_text_is_a_gate_or_an_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert Gate.of(text).op in (">", ">=", "<", "<=")
