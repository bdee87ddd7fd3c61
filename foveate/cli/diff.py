"""`foveate diff`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli.amounts import amount_options, taken
from foveate.cli.options import PASSES, json_option
from foveate.cli.output import Out, talking
from foveate.ir.collector import collector_paused

if TYPE_CHECKING:
    from foveate.ir.snapshot import Snapshot
    from foveate.report.diff import DiffReport

FORMATS = ("text", "markdown", "json", "html")
GATE_FAILED = 1


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--passes-a", default="", metavar="P", help=PASSES)
@click.option("--passes-b", default="", metavar="P", help="The same for B.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="How to show it.  [default: text]")
@click.option("-o", "--output", "file", metavar="FILE", help="Where to write it.  [default: stdout]")
@click.option(
    "--fail-if", "gates", multiple=True, metavar="GATE", help='Exit with 1 if it is so, as in "prefill.flops>+1%".'
)
@amount_options
@json_option
def command(
    a: str,
    b: str,
    passes_a: str,
    passes_b: str,
    form: str | None,
    file: str | None,
    gates: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """What differs in B: which cells of which layers changed, what that costs, and whether gates hold.

    A and B are files written by `foveate snapshot`, folders saved by foveate, or MODELs. Beside a snapshot a MODEL
    is costed at the snapshot's sizes.

    A gate is QUANTITY OP BOUND. QUANTITY: a number of the cost, such as prefill.flops, decode.time_s or kv_bytes, or
    prefill.nodes. OP: > >= < <=. BOUND: +1% (relative), +2e9 (absolute change), or 200MiB (B itself).
    """
    if as_json and file is None and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} both go to stdout; give -o FILE for one of them")
    form = form or ("json" if as_json else "text")
    with collector_paused(), talking(as_json or (form == "json" and file is None)) as out:
        target = None if file is None else _target(file, (a, b))
        from foveate.ir.diff.gates import Gate

        for gate in gates:
            Gate.of(gate)  # so that a wrong one is told before the work
        one, other = _sides(out, (a, passes_a), (b, passes_b), options)
        from foveate.report.diff import diff_report

        out.tick("comparing", 0, 1)
        report = diff_report(one, other, gates)
        out.tick("comparing", 1, 1)
        if target is None:
            out.line(_shown(report, form, out.console.width))
        else:
            from foveate.files import write_whole

            write_whole(target, (_shown(report, form, 80) + "\n").encode())
            out.line(f"written to {file}")
        out.finish(report.to_json())
        for failed in report.failed:
            out.note(f"gate failed: {failed.gate.text}: it is {failed.measured}")
    if report.failed:
        raise click.exceptions.Exit(GATE_FAILED)


def _shown(report: DiffReport, form: str, width: int) -> str:
    import json

    if form == "json":
        return json.dumps(report.to_json(), allow_nan=False)
    if form == "html":
        return report.to_html()
    return report.to_markdown() if form == "markdown" else report.to_text(width)


def _target(file: str, sources: tuple[str, str]) -> Path:
    from foveate.cli.errors import UseError
    from foveate.cli.folders import check_file

    path = check_file(file)
    if path.resolve() in {Path(source).expanduser().resolve() for source in sources}:
        raise UseError(f"output file {file} is one of the two that are compared")
    return path


def _sides(out: Out, a: tuple[str, str], b: tuple[str, str], options: dict[str, Any]) -> list[Snapshot]:
    """The snapshots of A and B: those that are files first, because they say at which sizes others are costed."""
    from foveate.cli.errors import UseError
    from foveate.ir.snapshot import read_snapshot

    dtype = options["dtype"]
    read: dict[int, Snapshot] = {}
    for place, ((name, passes), label) in enumerate(((a, "a"), (b, "b"))):
        if Path(name).expanduser().is_file():
            if passes:
                raise UseError(f"{name} is a snapshot and has its passes already; leave --passes-{label} out")
            read[place] = read_snapshot(Path(name))
    models = [name for place, (name, _) in enumerate((a, b)) if place not in read]
    if not models and any(value is not None for value in options.values()):
        raise UseError("both are snapshots, and costed already; leave sizes, --device and --dtype out")
    sizes, amounts = taken(options, models)
    given = amounts
    for beside in read.values():
        given = {**_amounts(beside), **amounts}
        dtype = dtype or beside.data["model"]["dtype"]
    rest = {place: side for place, side in enumerate((a, b)) if place not in read}
    made = {**read, **(_from_models(out, rest, dtype, sizes, given) if rest else {})}
    return [made[0], made[1]]


def _from_models(
    out: Out, sides: Mapping[int, tuple[str, str]], dtype: str | None, sizes: dict[str, int], amounts: dict[str, Any]
) -> dict[int, Snapshot]:
    """Snapshots of MODELs by place; two recipes of one model are tried on one trace."""
    from foveate.cli.models import is_saved
    from foveate.cli.programs import dense_program, load_program
    from foveate.ir.snapshot.make import snapshot
    from foveate.passes.pipeline import apply_pipeline, resolve

    dense: dict[str, Any] = {}
    made: dict[int, Snapshot] = {}
    chosen = {place: resolve(passes) for place, (_, passes) in sides.items()}
    for place, (name, passes) in sides.items():
        out.tick("tracing", len(made), 2)
        if is_saved(name):
            label, program = load_program(name, passes)
        else:
            if name not in dense:
                dense[name] = dense_program(name, dtype, sizes)
            label, program = name, apply_pipeline(dense[name].copy(), chosen[place])
        made[place] = snapshot(program, name=label, **amounts)
    return made


def _amounts(snapshot: Snapshot) -> dict[str, Any]:
    """What a snapshot's cost was asked for, as `foveate.cost` takes it."""
    numbers = ("visual_tokens", "text_tokens", "batch", "images", "prefix_tokens", "new_tokens", "past_tokens")
    bits = ("weight_bits", "kv_bits")
    sizes = snapshot.data["sizes"]
    found = {name: sizes[name] for name in (*numbers, *bits) if isinstance(sizes.get(name), int)}
    return {**found, **{name: sizes[name] for name in ("device", "dtype") if isinstance(sizes.get(name), str)}}
