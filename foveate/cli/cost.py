"""`foveate cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from foveate.cli.amounts import amount_options, taken
from foveate.cli.options import json_option
from foveate.cli.output import Out, table, talking
from foveate.ir.collector import collector_paused

if TYPE_CHECKING:
    from foveate.report.forecast import ForecastReport, Row

NOT_NEGATIVE = click.IntRange(min=0)
BITS = click.Choice(["4", "8", "16", "32"])
CONVENTIONS = ("actual", "yopo", "lvpruning", "llm-viewer")
TOP = 12
"""Parts of a breakdown that are shown; the JSON has all."""


@click.command("cost")
@click.argument("model")
@click.option(
    "--passes", "-p", "recipes", multiple=True, metavar="P", help="A pipeline or recipe; give it again for another one."
)
@click.option("--weight-bits", type=BITS, help="Bits of weight matrices.  [default: as dtype]")
@click.option("--kv-bits", type=BITS, help="Bits of the cache.  [default: as dtype]")
@click.option("--images", type=NOT_NEGATIVE, default=1, show_default=True, help="Images (or tiles) of a prompt.")
@click.option("--new-tokens", type=NOT_NEGATIVE, default=0, show_default=True, help="Length of the answer.")
@click.option(
    "--convention", type=click.Choice(CONVENTIONS), default="actual", show_default=True, help="What is counted."
)
@click.option("--modules", metavar="L,L,...", help="lvpruning: layers before which recipes have a decision module.")
@click.option("--breakdown", type=click.Choice(["layer", "role", "stream"]), help="Where the prefill time goes.")
@click.option("--plot", metavar="FILE.png", help="Draw roofline and layers.")
@amount_options
@json_option
def command(model: str, recipes: tuple[str, ...], plot: str | None, as_json: bool, **options: Any) -> None:
    """What MODEL costs, dense and after passes: FLOPs, memory, and time predicted on a device.

    MODEL is a shipped configuration such as llava-1.5-7b, "digits", "random:llava", a folder or a hub id. Only the
    configuration is read: no weights, no GPU.
    """
    from foveate.cli.errors import UseError
    from foveate.cli.folders import check_file
    from foveate.cli.programs import forecast_programs

    by, convention = options.pop("breakdown"), options.pop("convention")
    modules = _layers(options.pop("modules"))
    if modules and not recipes:
        raise UseError('--modules are counted in recipes: add one with --passes ("" for modules without pruning)')
    with collector_paused(), talking(as_json) as out:
        if plot:
            from foveate.report.plot import check_matplotlib

            check_file(plot, ".png")
            check_matplotlib()
        bits = {name: int(options[name]) for name in ("weight_bits", "kv_bits") if options[name]}
        sizes, amounts = taken({**options, **bits}, (model,))
        dense, programs, name = forecast_programs(model, recipes, options["dtype"], sizes, out.tick)
        from foveate.ir.cost import default_device
        from foveate.report.forecast import forecast_report

        device = amounts.pop("device", None) or default_device(dense)
        first = next(iter(programs), "")
        setting = {"model": name, "passes": first, "device": device, "convention": convention, **amounts}
        out.tick("counting", 0, 1)
        report = forecast_report(
            dense, programs, setting=setting, device=device, convention=convention, modules=modules, **amounts
        )
        out.tick("counting", 1, 1)
        _show(out, report)
        told = report.to_json()
        if by:
            told["breakdown"] = _breakdown(out, report, by)
        if plot:
            from foveate.files import write_whole
            from foveate.report.plot import forecast_png

            write_whole(check_file(plot, ".png"), forecast_png(report))
            out.line(f"drawn in {plot}")
        out.finish(told)


def _layers(text: str | None) -> tuple[int, ...]:
    from foveate.cli.errors import UseError

    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise UseError(f"--modules {text}: layer numbers with commas between, such as 1,8,16") from None


def _show(out: Out, report: ForecastReport) -> None:
    from foveate.report.figures import count, ms, size, spaced, times

    told = report.setting
    out.say(
        _folded(
            out,
            f"{told['model']} on {report.device.name}: {told['visual_tokens']} visual + {told['text_tokens']} text "
            f"tokens, batch {told['batch']}, predicted",
        )
    )
    named = list(zip(report.labels, report.rows, strict=True))
    for label, row in named[1:]:
        out.say(_folded(out, f"{label}: {spaced(row.name)}"))
    shown = table(None, "model", "FLOPs", "prefill\nms", "bound", "vision\nms", "decode\nms", "KV\ncache", "peak")
    shown.columns[0].min_width = len("dense")
    for label, row in named:
        spent = row.cost
        shown.add_row(
            label,
            count(spent.prefill.flops),
            ms(spent.prefill.time_s),
            spent.prefill.bound,
            ms(spent.vision.time_s),
            ms(spent.decode.time_s),
            size(spent.kv_bytes),
            size(spent.peak_bytes),
        )
    out.say(shown)
    if report.recipes:
        gains = report.gains(report.recipes[0])
        shown = table("predicted speed-up: first token, decode step", "model", *(f"batch {b}" for b in gains))
        for label, row in named[1:]:
            pairs = [(gain["first_token_time"], gain["decode_time"]) for gain in report.gains(row).values()]
            shown.add_row(label, *(", ".join(times(x) if x else "-" for x in pair) for pair in pairs))
        out.say(shown)
    if told["convention"] != "actual":
        for label, row in named:
            out.say(_folded(out, f"as {told['convention']} counts, {label}: {_published(told, row)}"))
    for warning in report.warnings():
        out.say(_folded(out, f"WARNING: {warning}"))


def _folded(out: Out, text: str) -> str:
    from foveate.report.figures import folded

    return folded(text, min(80, out.console.width))


def _published(told: Any, row: Row) -> str:
    """Figures with enough digits to be set beside a paper's."""
    work, spent = row.cost.prefill, row.cost
    said = f"{spent.first_token_flops / 1e12:.4f} TFLOPs"
    if told["convention"] != "llm-viewer":
        return said
    return (
        f"{said}, {1e3 * work.time_s:.2f} ms, {work.bytes / 1e9:.2f} GB moved, "
        f"{work.written / 1e9:.2f} GB of activations stored"
    )


def _breakdown(out: Out, report: ForecastReport, by: str) -> list[dict[str, Any]]:
    """One table a program: where the time to the first token goes."""
    from foveate.report.figures import count, ms, percent, size

    told = []
    for label, row in zip(report.labels, report.rows, strict=True):
        parts = row.forecast.parts([by])
        told.append(
            {"passes": row.name, **{graph: [part.to_json() for part in found] for graph, found in parts.items()}}
        )
        ranked = sorted(
            ((graph, part) for graph in ("vision", "prefill") for part in parts[graph]),
            key=lambda pair: -pair[1].work.time_s,
        )
        whole = sum(part.work.time_s for _, part in ranked) or 1.0
        shown = table(f"{label}, by {by}", "graph", by, "FLOPs", "bytes", "ms", "share", "bound", left=2)
        for graph, part in ranked[:TOP]:
            work = part.work
            shown.add_row(
                graph,
                str(getattr(part, by)),
                count(work.flops),
                size(work.bytes),
                ms(work.time_s),
                percent(work.time_s / whole),
                work.bound,
            )
        out.say(shown)
        if len(ranked) > TOP:
            rest = sum(part.work.time_s for _, part in ranked[TOP:])
            out.say(f"{len(ranked) - TOP} smaller parts take {percent(rest / whole)}")
    return told
