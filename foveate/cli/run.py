"""`foveate run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from foveate.cli.options import json_option, own_backend_option
from foveate.cli.output import Out, talking


@click.command("run")
@click.argument("model", metavar="DIR")
@click.option("--image", "images", multiple=True, metavar="X.png", help="An image; repeat it for several.")
@click.option("--prompt", required=True, help='A question; or a whole prompt with "<image>" for each image.')
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Longest answer.")
@click.option("--passes", "-p", metavar="P", help="Optimize MODEL with these passes first, instead of loading DIR.")
@click.option("--kept", metavar="X.png", help="Draw which patches stay: a row an image, a column a layer.")
@click.option("--curve", metavar="X.png", help="Draw what cls-curve cuts: each image's patches by likeness to CLS.")
@own_backend_option
@json_option
def command(
    model: str,
    images: tuple[str, ...],
    prompt: str,
    max_new_tokens: int,
    passes: str | None,
    kept: str | None,
    curve: str | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Ask the model saved in DIR a question about one or more images; answers greedily.

    DIR is a folder made by `foveate optimize` or `foveate export`, or any MODEL.
    """
    from foveate.cli import packaged
    from foveate.cli.folders import check_file
    from foveate.examples import open_image

    with talking(as_json) as out:
        kept_file, curve_file = (None if name is None else check_file(name, ".png") for name in (kept, curve))
        if curve_file is not None:
            from foveate.report.plot import check_matplotlib

            check_matplotlib()
        pictures = [open_image(Path(name).expanduser()) for name in images]
        drawn = passes or kept_file or curve_file
        quick = packaged.open_quickly(model, backend, bool(images)) if not drawn else None
        if quick is not None:
            answer = packaged.ask(quick, model, prompt, pictures, max_new_tokens)
        else:
            found = _find(model, passes, backend)
            answer = _ask(*found, prompt, pictures, max_new_tokens, kept_file, curve_file)
        _tell(out, answer)


def _tell(out: Out, answer: dict[str, Any]) -> None:
    out.line(answer["answer"])
    for layer, places in (answer["kept"] or {}).items():
        out.note(f"before layer {layer}: {len(places)} of {answer['visual_tokens']} visual tokens stay")
    out.finish(answer)


def _ask(
    processor: Any,
    get_model: Callable[[], Any],
    prompt: str,
    pictures: list[Any],
    max_new_tokens: int,
    kept_file: Path | None,
    curve_file: Path | None,
) -> dict[str, Any]:
    from foveate.cli.pictures import draw_curve, draw_kept
    from foveate.cli.prompts import encode, full_prompt
    from foveate.clip import questions_for

    text = full_prompt(processor, prompt, len(pictures))
    optimized = get_model()
    inputs = encode(optimized, processor, text, pictures, max_new_tokens)
    inputs |= questions_for(optimized, [prompt] * len(pictures))
    curves = None if curve_file is None else draw_curve(optimized, inputs, curve_file)
    answer = _generate(optimized, processor, inputs, max_new_tokens)
    if kept_file is not None:
        draw_kept(optimized, processor, inputs, answer["kept"], kept_file)
    return {
        **answer,
        "prompt": text,
        "passes": [r.text for r in optimized.program.passes],
        "backend": optimized.backend,
        **({} if curves is None else {"curves": curves}),
    }


def _find(model: str, passes: str | None, backend: str | None) -> tuple[Any, Callable[[], Any]]:
    """The processor, and what makes the optimized model: prompts are checked before the long work."""
    from foveate.cli.errors import UseError
    from foveate.cli.models import is_saved, load_model, load_saved, saved_processor
    from foveate.passes.pipeline import resolve

    if is_saved(model):
        if passes is not None:
            raise UseError(f"{model} was saved by foveate and is optimized already; leave --passes out")
        return saved_processor(model), lambda: load_saved(model, backend)
    chosen = resolve(passes)
    loaded = load_model(model)
    import foveate

    return loaded.get_processor(), lambda: foveate.optimize(loaded.model, chosen, backend=backend or "eager")


def _generate(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    import torch

    from foveate.cli.prompts import told
    from foveate.report.kept import kept_places

    with torch.inference_mode():
        kept = kept_places(model, inputs)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    prompt = inputs["input_ids"]
    return told(processor, prompt, ids[0, prompt.shape[1] :], model.program.info.image_token_id, kept)
