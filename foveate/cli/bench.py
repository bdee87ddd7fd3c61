"""`foveate bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from foveate.cli.options import AT_LEAST_ONE, DTYPES, backend_option, given_sizes, json_option, size_options
from foveate.cli.output import Out, table, talking

if TYPE_CHECKING:
    from foveate.bench import Bench


@click.command("bench")
@click.argument("model", required=False)
@click.option("--passes", "-p", metavar="P", help="As for `foveate optimize`.")
@click.option(
    "--calibrate", metavar="FILE.yaml", help="Measure this machine instead, for `foveate cost --device FILE.yaml`."
)
@backend_option
@size_options
@click.option("--text-tokens", type=AT_LEAST_ONE, default=64, show_default=True, help="Text tokens of a prompt.")
@click.option("--batch", type=AT_LEAST_ONE, default=1, show_default=True, help="Prompts at once, one image each.")
@click.option("--threads", type=AT_LEAST_ONE, help="CPU threads.  [default: torch's]")
@click.option("--repeat", type=AT_LEAST_ONE, default=7, show_default=True, help="Timed rounds.")
@click.option("--new-tokens", type=AT_LEAST_ONE, default=16, show_default=True, help="Decode steps in each round.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights.  [default: the model's]")
@json_option
def command(
    model: str | None,
    passes: str | None,
    calibrate: str | None,
    backend: str,
    text_tokens: int,
    batch: int,
    threads: int | None,
    repeat: int,
    new_tokens: int,
    dtype: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL with passes against its dense form on the same backend, and against Hugging Face (SDPA).

    One process, random prompts of one image each, the three models in turn, medians. Prefill is the
    whole call: vision, decoder, selection, cache. The FLOPs cover the same work.
    """
    from foveate.cli.errors import UseError
    from foveate.cli.models import load_model
    from foveate.passes.pipeline import resolve

    if calibrate:
        if model or passes:
            raise UseError("--calibrate measures the machine, no model: leave MODEL and --passes out")
        with talking(as_json) as out:
            _calibrate(out, calibrate, threads)
        return
    if model is None or passes is None:
        raise UseError("give MODEL and --passes, or --calibrate FILE.yaml")
    with talking(as_json) as out:
        chosen = resolve(passes)
        out.tick("loading the model", 0, 1)
        loaded = load_model(model, given_sizes(options), dtype)
        from foveate.bench import bench

        result = bench(
            loaded.model,
            chosen,
            backend=backend,
            text_tokens=text_tokens,
            batch=batch,
            threads=threads,
            repeat=repeat,
            new_tokens=new_tokens,
            tick=out.tick,
        )
        _show(out, model, result)
        out.finish({"model": model, **result.to_json()})


def _calibrate(out: Out, name: str, threads: int | None) -> None:
    """Write a device file and say what is in it."""
    from dataclasses import asdict

    from foveate.cli.folders import check_file
    from foveate.files import write_whole
    from foveate.machine import calibrate, thread_count
    from foveate.report.figures import count, percent

    path = check_file(name, ".yaml")
    out.tick("measuring this machine", 0, 1)
    with thread_count(threads):
        device = calibrate(seconds=8)
    out.tick("measuring this machine", 1, 1)
    write_whole(path, device.to_yaml().encode())
    out.say(
        f"{device.name}: {count(device.flops_per_s['float32'])}FLOP/s, {count(device.bytes_per_s)}B/s, attention at "
        f"{percent(device.attention)} of that rate, shortest op {1e6 * device.op_s:.1f} us"
    )
    out.line(f"saved in {name}; use it with: foveate cost MODEL --device {name}")
    out.finish({"file": name, "device": asdict(device)})


def _show(out: Out, model: str, result: Bench) -> None:
    from foveate.report.figures import count, folded, ms, size, spaced, times

    setting = result.setting
    out.say(
        folded(f"{model}, {spaced(setting['passes']) or 'no passes'}"),
        f"{setting['backend']}, {setting['dtype']}, threads {setting['threads']}, batch {setting['batch']}: "
        f"{setting['visual_tokens']} visual + {setting['text_tokens']} text tokens; "
        f"medians of {setting['repeat']} rounds",
    )
    shown = table(None, "model", "FLOPs", "prefill ms", "decode ms", "KV cache")
    names = {"hf": "Hugging Face", "dense": "dense", "optimized": "optimized"}
    for name, label in names.items():
        timing, spent = result.times[name], result.costs.get(name)
        figures = (count(spent.first_token_flops), size(spent.kv_bytes)) if spent else ("", "")
        shown.add_row(label, figures[0], ms(timing.prefill_s), ms(timing.decode_s), figures[1])
    for base in ("dense", "hf"):
        flops = times(result.flop_speedup) if base == "dense" else ""
        prefill, decode = (times(result.speedup(phase, base)) for phase in ("prefill", "decode"))
        shown.add_row(f"speed-up over {names[base]}", flops, prefill, decode, "")
    out.say(shown)
    reached = result.speedup("prefill") / result.flop_speedup
    out.say(f"prefill reaches {reached:.0%} of the FLOP speed-up; vision alone takes {ms(result.vision_s)} ms of it")
    for loss in result.losses():
        out.say(f"SLOWER: {loss}")
