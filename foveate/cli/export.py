"""`foveate export`."""

from __future__ import annotations

from typing import Any

import click

from foveate.cli.options import PASSES, given_sizes, json_option, size_options
from foveate.cli.output import talking


@click.command("export")
@click.argument("model", metavar="MODEL_OR_DIR")
@click.option("--passes", "-p", metavar="P", help=f"{PASSES} Leave it out for a folder that foveate saved.")
@click.option(
    "--backend",
    type=click.Choice(["onnx", "tensorrt", "aoti"]),
    default="onnx",
    show_default=True,
    help="What will run it.",
)
@click.option("-o", "--output", "folder", required=True, metavar="OUT", help="A folder that does not exist yet.")
@click.option(
    "--range",
    "spans",
    multiple=True,
    metavar="AXIS=LEAST:LIKELY:MOST",
    help="TensorRT: sizes to build for, such as batch=1:1:4; repeat it for several axes.",
)
@click.option("--serving", type=click.Choice(["triton"]), help="Write what this server needs to run OUT, too.")
@click.option("--opset", type=int, metavar="N", help="ONNX: the graphs' opset, 20 to 24.  [default: 23]")
@click.option("--plugin", is_flag=True, help="TensorRT: neighbor-attention as a plugin. EXPERIMENTAL, never run yet.")
@click.option("--no-verify", is_flag=True, help="Do not run it beside torch before it is kept.")
@size_options
@json_option
def command(
    model: str,
    passes: str | None,
    backend: str,
    folder: str,
    spans: tuple[str, ...],
    serving: str | None,
    opset: int | None,
    plugin: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a model, with its passes inside the graphs, for ONNX Runtime; exit code 1 if it disagrees with torch.

    For TensorRT the same graphs are linted and a build is prepared; it is run where TensorRT is installed. For Triton
    Inference Server they become a model repository, OUT/serving/triton. With aoti, OUT is a saved model, and what
    AOTInductor compiles for this machine goes to a cache of this user.

    MODEL_OR_DIR is a folder made by `foveate optimize`, or any MODEL. Ask OUT with `foveate run` or `foveate.load`.
    """
    from foveate.cli.errors import UseError
    from foveate.cli.folders import new_folder
    from foveate.errors import ParityError

    sizes = _sizes(spans)
    with talking(as_json) as out, new_folder(folder) as part:
        out.tick("loading the model", 0, 2)
        optimized, get_processor = _find(model, passes, given_sizes(options))
        from foveate.api import export

        out.tick("exporting", 1, 2)
        try:
            exported = export(
                optimized,
                backend,
                output=part,
                verify=not no_verify,
                sizes=sizes,
                serving=serving,
                opset=opset,
                plugin=plugin,
            )
        except ParityError as error:
            click.echo(f"error: {error}", err=True)
            raise click.exceptions.Exit(1) from None
        try:
            get_processor().save_pretrained(part)
            processor = True
        except UseError as error:
            out.note(f"no processor is saved, so `foveate run` will not work here: {error}")
            processor = False
        for line in str(exported).replace(str(part), folder).splitlines():
            out.line(line)
        out.finish({**exported.to_json(), "folder": folder, "processor": processor})


def _sizes(spans: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    from foveate.cli.errors import UseError

    found = {}
    for span in spans:
        name, _, text = span.partition("=")
        try:
            least, likely, most = (int(number) for number in text.split(":"))
        except ValueError:
            raise UseError(f"--range {span}: write AXIS=LEAST:LIKELY:MOST, such as batch=1:1:4") from None
        found[name] = least, likely, most
    return found


def _find(model: str, passes: str | None, sizes: dict[str, int]) -> tuple[Any, Any]:
    """The optimized model, and what gets its processor."""
    from foveate.cli.errors import UseError
    from foveate.cli.models import is_saved, load_model, load_saved, saved_processor
    from foveate.passes.pipeline import resolve

    if is_saved(model):
        if passes is not None:
            raise UseError(f"{model} was saved by foveate and is optimized already; leave --passes out")
        return load_saved(model, "eager"), lambda: saved_processor(model)
    chosen = resolve(passes)
    loaded = load_model(model, sizes)
    from foveate.api import optimize

    return optimize(loaded.model, chosen), loaded.get_processor
