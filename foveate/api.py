"""The public functions; each is a few calls of the layers below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.ir.cost import Cost, cost_of
from foveate.ir.program import Program
from foveate.ir.statistics import Statistics
from foveate.loading import load
from foveate.model import OptimizedModel
from foveate.models.registry import family_of, trace_program
from foveate.package import Exported
from foveate.passes.pipeline import Passes, apply_pipeline
from foveate.report.diff import DiffReport, Source, diff_report

__all__ = ["cost", "diff", "export", "load", "optimize", "trace"]


def trace(model: Any) -> Program:
    """The program of a supported transformers model, before any pass; works on the `meta` device.

    Raises UnsupportedModelError or TraceError; the model is left as it was.
    """
    return trace_program(model)


def optimize(
    model: Any,
    passes: Passes | None = None,
    calibration: Statistics | str | Path | None = None,
    backend: str = "eager",
    traced: Program | None = None,
) -> OptimizedModel:
    """A faster model with the same calling convention.

    passes: a list of passes, a pipeline as text, `recipe:NAME`, or the path of a YAML recipe. backend: `eager`,
    `inductor`, `onnx` or `aoti`. calibration: statistics of the model, or the file that `foveate calibrate` made, for
    passes that want them and have no `stats` of their own. traced: what `trace(model)` gave, so that several recipes
    can be tried on one trace; it is not changed. The weights are shared with `model`, which is left as it was. Raises
    FoveateError subclasses.
    """
    family_of(model)
    statistics = Statistics.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    program = apply_pipeline(trace(model) if traced is None else traced.copy(), passes, statistics)
    program.forget_unused()
    return OptimizedModel(program, model.config, model.generation_config, backend)


def export(
    model: OptimizedModel,
    backend: str = "onnx",
    *,
    output: str | Path,
    verify: bool = True,
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
    serving: str | None = None,
    opset: int | None = None,
    plugin: bool = False,
) -> Exported:
    """Write an optimized model as a package for another runtime, into a new folder; see `foveate.package`.

    backend: `onnx`; `tensorrt`, which prepares a build as well and runs it where TensorRT is installed; `aoti`, which
    compiles for this machine into the user's cache. verify: run the package on random prompts and hold it to eager
    torch. sizes: least, likeliest and largest size of what TensorRT's profiles span, such as `{"batch": (1, 1, 4)}`.
    serving: `triton` to write a model repository for Triton Inference Server too. opset: of ONNX graphs, 20 to 24; None
    is 23. plugin: TensorRT runs `neighbor-attention` by a kernel of foveate's, compiled ahead of time (experimental).

    Raises BackendError for a backend or pass that cannot be exported, ParityError where the package does not agree, and
    ArtifactError where it cannot be written.
    """
    from foveate.package import export as export_model

    return export_model(model, backend, Path(output), verify, sizes, serving, opset, plugin)


def cost(program: Program, **sizes: Any) -> Cost:
    """FLOPs, bytes and predicted time of a program; see `foveate.ir.cost.Forecast.of` for the sizes it takes."""
    return cost_of(program, **sizes)


def diff(a: Source, b: Source, gates: Iterable[str] = (), **sizes: Any) -> DiffReport:
    """What differs in `b`, with `.to_text()`, `.to_markdown()`, `.to_json()` and `.to_html()`.

    a, b: programs, optimized models, snapshots, or paths of snapshot files. gates: such as `prefill.flops>+1%`.
    sizes: what `foveate.cost` takes, for those that are no snapshots yet. Raises ArtifactError for a damaged file,
    InputError for a gate or size that is wrong.
    """
    return diff_report(a, b, gates, **sizes)
