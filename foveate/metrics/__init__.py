"""How replies are marked: a metric gives each reply 0 to 1, and a list of replies its figures with intervals."""

from __future__ import annotations

from foveate.metrics.base import Metric
from foveate.metrics.choice import Choice
from foveate.metrics.exact import Exact, Verbatim
from foveate.metrics.vqa import Vqa
from foveate.metrics.yes_no import YesNo

METRICS: dict[str, Metric] = {metric.name: metric for metric in (Exact(), Verbatim(), Vqa(), Choice(), YesNo())}
"""Name -> metric, as `foveate eval --metric` takes it."""

__all__ = ["METRICS", "Choice", "Exact", "Metric", "Verbatim", "Vqa", "YesNo"]
