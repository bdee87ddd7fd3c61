"""The comparison table's remarks on losses, and what its sizes count."""

from __future__ import annotations

from typing import Any

from foveate.bench import Timing
from foveate.evaluate import Score, agreement
from foveate.ir.cost import Cost
from foveate.ir.cost.work import Work
from foveate.report.compare import Row, losses

SPENT = Cost(Work(10, time_s=0.5), Work(30, time_s=1.0), Work(1, time_s=0.1), kv_bytes=8, peak_bytes=9, parameters=7)


def row(name: str, prefill: float, decode: float) -> Row:
    score = Score(("7", "2", "x"), (True, False, False), ("lookup", "count", "lookup"))
    return Row(name, "fastv", None, SPENT, Timing([prefill], [decode]), score)


def test_every_loss_is_told_and_nothing_else() -> None:
    rows = [row("dense", 0.2, 0.01), row("a", 0.1, 0.02), row("b", 0.3, 0.01), row("c", 0.25, 0.005)]
    assert losses(rows) == ["prefill of b 300, c 250 against 200 ms", "decode of a 20 against 10 ms"]
    assert losses(rows[:1]) == []


def test_a_row_covers_vision_and_prefill() -> None:
    told: dict[str, Any] = row("a", 0.2, 0.01).to_json()
    assert (told["flops"], told["predicted_s"]) == (40, 1.5)
    assert (told["accuracy"], told["n"]) == (1 / 3, 3)
    assert told["by_task"] == {"count": 0.0, "lookup": 0.5}


def test_agreement_counts_the_same_words() -> None:
    one = Score(("1", "2"), (True, False), ("lookup", "lookup"))
    other = Score(("1", "3"), (True, False), ("lookup", "lookup"))
    assert agreement(one, other) == 0.5
    assert agreement(one, one) == 1.0
