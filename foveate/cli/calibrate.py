"""`foveate calibrate`."""

from __future__ import annotations

from typing import Any

import click

from foveate.cli.options import AT_LEAST_ONE, json_option
from foveate.cli.output import table, talking

ALPHA = 0.1
"""Threshold for the table; passes have their own."""


@click.command("calibrate")
@click.argument("model")
@click.option("--data", required=True, metavar="D", help='JSONL of {"image", "prompt"}, a folder, or "digits".')
@click.option("-o", "--output", required=True, metavar="X.safetensors", help="Where the statistics go.")
@click.option("-n", "--samples", type=AT_LEAST_ONE, default=100, show_default=True, help="Samples at most.")
@click.option("--batch", type=AT_LEAST_ONE, default=8, show_default=True, help="Samples at once.")
@click.option("--tokens", is_flag=True, help="Also what each visual token receives, for fitprune.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted calibration stopped.")
@json_option
def command(
    model: str, data: str, output: str, samples: int, batch: int, tokens: bool, resume: bool, as_json: bool
) -> None:
    """Count what MODEL's heads and neurons do with images, for passes that drop the idle ones.

    A folder holds a .jsonl file, or images, each with its question in a .txt of the same name (default: "Describe this
    image.").
    """
    from foveate.cli.folders import check_file
    from foveate.cli.models import load_model

    with talking(as_json) as out:
        path = check_file(output, ".safetensors")
        out.tick("loading the model", 0, 1)
        loaded = load_model(model)
        processor = loaded.get_processor()
        from foveate.calibrate import calibrate

        examples = _examples(data, processor, samples)
        options: dict[str, Any] = {"batch": batch, "name": model, "resume": resume, "tokens": tokens}
        found = calibrate(loaded.model, processor, examples, output=path, tick=out.tick, **options)
        layers = _layers(found)
        shown = table(None, "layer", "active heads", "text to image", "cut here", left=0)
        for layer, row in enumerate(layers):
            cells = str(row["active_heads"]), f"{row['text_to_visual']:.1%}", f"{row['cut_kl']:.2g}"
            shown.add_row(str(layer), *cells)
        out.say(
            shown,
            f"active: mass ratio above {ALPHA} in more than 40% of {found.samples} samples; text to image: share of "
            "attention that a text token behind the image pays to it; cut here: KL divergence of the first output "
            "token if text sees text only from that layer on",
        )
        out.line(f"saved in {output}")
        out.finish({"output": output, "model": model, "data": data, "samples": found.samples, "layers": layers})


def _examples(data: str, processor: Any, count: int) -> Any:
    from foveate.cli.data import read_examples
    from foveate.cli.models import DIGITS

    if data != DIGITS:
        return read_examples(data, processor, count=count)
    from foveate.examples import Example
    from foveate.models.digits import samples

    drawn = samples("train", n=count)
    return [Example(s.prompt, [s.image], s.answer, f"digits sample {i + 1}") for i, s in enumerate(drawn)]


def _layers(found: Any) -> list[dict[str, Any]]:
    active = found.active(ALPHA).sum(1).tolist()
    shares = (found.text_to_visual / found.samples).mean(1).tolist()
    cuts = (found.cut_kl / found.samples).tolist()
    names = ("active_heads", "text_to_visual", "cut_kl")
    return [dict(zip(names, row, strict=True)) for row in zip(active, shares, cuts, strict=True)]
