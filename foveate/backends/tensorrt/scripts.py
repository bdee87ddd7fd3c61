"""What builds the engines on the machine that has TensorRT: Polygraphy's scripts, and trtexec's command lines."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from foveate.backends.tensorrt.plugin import registering
from foveate.backends.tensorrt.profiles import Profile, Shape
from foveate.errors import BackendError

FOLDER = "trt"
TIMINGS = f"{FOLDER}/timing.cache"
COMMAND = f"python3 {FOLDER}/build_trt.py"

BUILD = '''"""Build every engine of this package and compare its answers with the references, through Polygraphy.

    pip install polygraphy numpy tensorrt && {command}
"""

import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
for script in sorted(here.glob("build_*.py")):
    if script.name != Path(__file__).name:
        print(script.name, flush=True)
        if subprocess.run([sys.executable, str(script)], cwd=here.parent).returncode:
            sys.exit(f"{{script.name}} failed, for the reason above")
'''


@dataclass(frozen=True)
class Options:
    """How engines are built. tolerance: how far, absolutely and relatively, answers may be from the references."""

    refit: bool = False
    weight_streaming: bool = False
    tolerance: float = 1e-2


@dataclass(frozen=True)
class Job:
    """One engine to build. file: the ONNX file, beside the weights. references: whether there are any to compare.

    plugin: whether it has nodes for foveate's plugin, which Python alone can register.
    """

    graph: str
    file: str
    profile: Profile
    references: bool
    plugin: bool = False

    @property
    def engine(self) -> str:
        """Where the engine goes, from the package's folder."""
        return f"{FOLDER}/{self.graph}.engine"


def build_script() -> str:
    """`build_trt.py`: runs the script of each graph."""
    return BUILD.format(command=COMMAND)


def has_polygraphy() -> bool:
    """Whether Polygraphy is installed here."""
    return find_spec("polygraphy") is not None


def polygraphy_arguments(job: Job, options: Options) -> list[str]:
    """The arguments of `polygraphy` that build and run a graph, as seen from the package's folder."""
    arguments = ["run", job.file, "--trt", "--strongly-typed"]
    arguments += ["--load-timing-cache", TIMINGS, "--save-timing-cache", TIMINGS, "--save-engine", job.engine]
    arguments += ["--refittable"] * options.refit + ["--weight-streaming"] * options.weight_streaming
    for size in ("min", "opt", "max"):
        if job.profile:
            shapes = (f"{name}:[{_list(getattr(s, size))}]" for name, s in job.profile.items())
            arguments += [f"--trt-{size}-shapes", *shapes]
    if job.references:
        arguments += ["--load-inputs", f"{FOLDER}/{job.graph}.in.json"]
        arguments += ["--load-outputs", f"{FOLDER}/{job.graph}.out.json"]
        arguments += ["--compare", "simple", "--atol", f"{options.tolerance:g}", "--rtol", f"{options.tolerance:g}"]
    return arguments


def polygraphy_script(job: Job, options: Options, package: Path) -> str:
    """The script that Polygraphy itself writes for a graph, with paths from the package's folder.

    Raises BackendError where Polygraphy is not installed, or does not write it.
    """
    if not has_polygraphy():
        raise BackendError("build scripts are written by Polygraphy: pip install polygraphy")
    program = "import sys; from polygraphy.tools import main; sys.argv[0] = 'polygraphy'; sys.exit(main())"
    command = [sys.executable, "-c", program, *polygraphy_arguments(job, options), "--gen-script", "-"]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True)
    start = done.stdout.find("#!/usr/bin/env python3")
    if done.returncode != 0 or start < 0:
        line = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise BackendError(f"Polygraphy wrote no build script for {job.file}: {line}")
    text = done.stdout[start:].replace(f"{package.resolve()}/", "")
    text = re.sub(r"^(# Template .*\]) on .*$", r"\1", text, count=1, flags=re.MULTILINE)
    return registering(text) if job.plugin else text


def trtexec_script(jobs: Sequence[Job], options: Options) -> str:
    """`trtexec.sh`: the same engines by NVIDIA's own tool, without a comparison."""
    lines = ["#!/bin/sh", "# Builds every engine of this package with trtexec; no answers are compared.", "set -e"]
    lines.append('cd "$(dirname "$0")/.."')
    for job in jobs:
        if job.plugin:
            lines.append(f"# {job.graph} has nodes for a plugin that Python registers: {COMMAND}")
            continue
        words = ["trtexec", f"--onnx={job.file}", "--stronglyTyped", f"--timingCacheFile={TIMINGS}"]
        words += [f"--saveEngine={job.engine}", "--skipInference"]
        words += ["--refit"] * options.refit + ["--allowWeightStreaming"] * options.weight_streaming
        for size in ("min", "opt", "max"):
            shapes = ",".join(f"{name}:{_crosses(getattr(s, size))}" for name, s in job.profile.items())
            words += [f"--{size}Shapes={shapes}"] * bool(shapes)
        lines.append(" \\\n    ".join(shlex.quote(word) for word in words))
    return "\n".join(lines) + "\n"


def _list(shape: Shape) -> str:
    return ",".join(map(str, shape))


def _crosses(shape: Shape) -> str:
    return "x".join(map(str, shape))
