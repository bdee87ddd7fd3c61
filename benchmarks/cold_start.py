"""Seconds from the start of a process to its first token, for each backend; see README.md.

Every line is a process of its own that loads a saved folder and answers one prompt with one image.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from writing import RESULTS, needs, replace, versions

DECODER: dict[str, Any] = {"layers": 12, "hidden": 1024, "heads": 16, "ffn": 2816, "visual_tokens": 576}
TOWER: dict[str, Any] = {"vision_layers": 2, "vision_hidden": 32, "vision_heads": 2}
SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "visual_tokens": 16}
MODELS = {"digits": "fastv{layer=3,keep=0.5},cut-visual{from_layer=8}", "decoder": "recipe:yopo-25"}
"""Model -> its passes."""

LINES = (
    ("eager", "eager", ""),
    ("ONNX Runtime, exported", "onnx", ""),
    ("the same over numpy, without torch", "np", ""),
    ("AOTInductor, warm cache", "aoti", ""),
    ("torch.compile, cold cache", "inductor", "cold"),
    ("torch.compile, warm cache", "inductor", "warm"),
)
"""Name, backend, and the state of torch's cache."""


def main() -> None:
    """Measure every line and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "BACKEND", "STARTED"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--no-aoti", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeat", type=int, default=3, help="processes for each line, but for a cold cache, which is one"
    )
    parser.add_argument("--quick", action="store_true", help="a small decoder alone, one process a line; needs -o")
    parser.add_argument("--only", choices=[name for name, *_ in LINES], help="renew one line of the results")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    if args.one:
        folder, backend, started = args.one
        print(json.dumps(one(folder, backend, started, args.threads)))
        return
    if args.make:
        model, folder = args.make
        print(json.dumps(make(model, folder, args.quick, args.no_aoti)))
        return
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its times mean nothing and must not replace the results")
    needs(parser, "onnx", "onnxruntime")
    target: Path = args.output or RESULTS
    file = target / "cold-start.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if args.only else []
    rows = [row for row in rows if row["line"] != args.only]
    options = ["--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    options += ["--no-aoti"] if args.only and "AOT" not in args.only else []
    environment: dict[str, Any] = {}
    for model in ["decoder"] if args.quick else MODELS:
        with tempfile.TemporaryDirectory() as folder:
            built = apart(["--make", model, folder, *options], Path(folder))
            environment = built.pop("environment")
            for line in LINES:
                if args.only in (None, line[0]):
                    rows.append(measure(model, line, Path(folder), options, 1 if args.quick else args.repeat))
            if not args.only:
                rows.append({"model": model, "line": "build", **built})
    order = [name for name, *_ in LINES]
    rows.sort(key=lambda row: ([*MODELS].index(row["model"]), [*order, "build"].index(row["line"])))
    result = {"threads": args.threads, "quick": args.quick, "environment": environment, "rows": rows}
    replace(file, json.dumps(result, indent=2) + "\n")
    replace(target / "cold-start.md", markdown(result))
    print(markdown(result))


def measure(model: str, line: tuple[str, str, str], folder: Path, options: list[str], repeat: int) -> dict[str, Any]:
    """The medians of some processes; a cold cache is filled by the first, so there is one of those."""
    name, backend, state = line
    source = folder / {"np": "onnx"}.get(backend, backend if backend in ("onnx", "aoti") else "saved")
    runs = [
        apart(["--one", str(source), backend, repr(time.time()), *options], folder)
        for _ in range(1 if state == "cold" else repeat)
    ]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    print(f"{model}, {name}: {medians['first_token_s']:.1f} s", file=sys.stderr, flush=True)
    return {"model": model, "line": name, "runs": runs, **medians}


def apart(arguments: list[str], folder: Path) -> dict[str, Any]:
    """What this script says in a new process, whose caches lie in `folder`."""
    caches = {"FOVEATE_CACHE": str(folder / "foveate-cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch-cache")}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(name: str, folder: str, quick: bool, no_aoti: bool) -> dict[str, Any]:
    """Save a model and export it for both runtimes; the seconds that took."""
    import foveate
    from foveate.machine import environment
    from foveate.models import digits
    from foveate.models.random import random_llava

    model = digits.load()[0] if name == "digits" else random_llava(**(SMALL if quick else DECODER), **TOWER)
    optimized = foveate.optimize(model, MODELS[name])
    target = Path(folder)
    optimized.save_pretrained(target / "saved")
    begun = time.perf_counter()
    foveate.export(optimized, output=target / "onnx", verify=False)
    onnx_s = time.perf_counter() - begun
    if no_aoti:
        return {"environment": environment()}
    built = foveate.export(optimized, backend="aoti", output=target / "aoti", verify=False).compiled
    return {"onnx_export_s": onnx_s, "aoti": built.to_json(), "environment": environment()}


def one(folder: str, backend: str, started: str, threads: int) -> dict[str, float]:
    """Seconds from `started`, a time of the clock, until foveate is imported, a model loaded, and two tokens made."""
    return (first_array if backend == "np" else first_token)(folder, backend, started, threads)


def first_array(folder: str, backend: str, started: str, threads: int) -> dict[str, float]:
    """The same over numpy arrays; threads are ONNX Runtime's own choice."""
    import numpy as np

    import foveate

    seconds = {"import_s": time.time() - float(started)}
    model = foveate.load(folder, tensors="np")
    assert "torch" not in sys.modules
    config = json.loads((Path(folder) / "config.json").read_text())["vision_config"]
    seconds["loaded_s"] = time.time() - float(started)
    about, size = model.about, config["image_size"]
    ids = np.array([[1, 5, *[about.image_token_id] * about.tokens_per_image, 6, 7, 8]])
    out = model(input_ids=ids, pixel_values=np.zeros((1, 3, size, size), np.float32))
    token = out.logits[:, -1:].argmax(-1)
    seconds["first_token_s"] = time.time() - float(started)
    model(input_ids=token, cache=out.cache).logits.argmax(-1)
    seconds["second_token_s"] = time.time() - float(started)
    return seconds


def first_token(folder: str, backend: str, started: str, threads: int) -> dict[str, float]:
    """See `one`; over torch tensors."""
    import torch

    import foveate
    from foveate.package import prompts

    torch.set_num_threads(threads)
    seconds = {"import_s": time.time() - float(started)}
    model = foveate.load(folder, backend=backend)
    seconds["loaded_s"] = time.time() - float(started)
    info = model.program.info
    inputs = prompts(info, len(model.weights.get(info.paths["embed"])), (1,), 0)
    with torch.inference_mode():
        out = model(**inputs)
        token = out.logits[:, -1:].argmax(-1)
        seconds["first_token_s"] = time.time() - float(started)
        model(input_ids=token, cache=out.cache).logits.argmax(-1)
    seconds["second_token_s"] = time.time() - float(started)
    return seconds


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    about = result["environment"]
    lines = [
        "# Cold start",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs, {result['threads']} threads, fp32. Seconds from the "
        "start of a process, medians; files were read before.",
        "",
        "| model | backend | imported | loaded | first token | second token |",
        "|---|---|--:|--:|--:|--:|",
    ]
    keys = ("import_s", "loaded_s", "first_token_s", "second_token_s")
    for row in result["rows"]:
        if row["line"] != "build":
            lines.append(f"| {row['model']} | {row['line']} | {' | '.join(f'{row[key]:.2f}' for key in keys)} |")
    lines.append("")
    for row in result["rows"]:
        if row["line"] == "build":
            built = row["aoti"]
            lines.append(
                f"Before that, `{row['model']}`: exported to ONNX in {row['onnx_export_s']:.1f} s; {built['compiled']} "
                f"regions compiled by AOTInductor in {built['compile_s']:.1f} s, {built['bytes'] / 2**20:.1f} MiB."
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
