"""Everything that a TensorRT build needs, written into an ONNX package; the build itself, where TensorRT is installed.

    decoder_prefill.trt.onnx    the copy for TensorRT, beside model.safetensors, where it must differ (`adapt`)
    trt/lint.json               what stands in each graph, and that it breaks no row of the table
    trt/profiles.json           the sizes that engines are built for
    trt/GRAPH.in.json .out.json references, as Polygraphy reads them
    trt/build_trt.py            runs build_GRAPH.py, which Polygraphy wrote, for each graph
    trt/trtexec.sh              the same engines by trtexec
    trt/foveate_plugin.py ...   the plugin, where the export asked for it (`plugin`)
    trt/status.json             built, or prepared and not built: what is missing, and the command to run

Copies lie beside the weights because ONNX allows no external data outside a model's own folder, nor behind links.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.backends.tensorrt import lint, plugin, profiles
from foveate.backends.tensorrt.adapt import adapted
from foveate.backends.tensorrt.profiles import Range
from foveate.backends.tensorrt.reading import read
from foveate.backends.tensorrt.references import Arrays, inputs_json, outputs_json
from foveate.backends.tensorrt.scripts import (
    COMMAND,
    FOLDER,
    Job,
    Options,
    build_script,
    has_polygraphy,
    polygraphy_script,
    trtexec_script,
)
from foveate.backends.tensorrt.table import operators
from foveate.errors import ArtifactError, BackendError
from foveate.files import write_whole

if TYPE_CHECKING:
    import onnx

COPY = ".trt.onnx"
BUILT, PREPARED = "built", "prepared, not built"
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
"""Names that need no quoting in a script or on a command line."""


@dataclass(frozen=True)
class Status:
    """How far TensorRT got: `built`, or `prepared, not built` with what is missing and the one command to run."""

    status: str
    missing: tuple[str, ...]
    command: str
    engines: tuple[str, ...]

    def __str__(self) -> str:
        if self.status == BUILT:
            return f"TensorRT: built {', '.join(self.engines)}"
        return f"TensorRT: {self.status}; missing: {', '.join(self.missing)}. On the target machine: {self.command}"


def prepare(
    folder: Path,
    ranges: Mapping[str, Range],
    references: Mapping[str, tuple[Arrays, Arrays]] | None = None,
    options: Options | None = None,
    tensorrt: str | None = None,
) -> Status:
    """Write `trt/` into an exported ONNX package, and build its engines if TensorRT can be imported.

    Args:
        folder: holds model.safetensors and the graphs, one NAME.onnx each.
        ranges: the sizes of every symbolic dimension (`profiles`).
        references: by graph, inputs and what it must answer.
        options: how to build.
        tensorrt: the target's version, where it is older than the table's.

    Raises:
        ArtifactError: the folder is no such package, or cannot be written.
        InputError: ranges or references do not fit the graphs.
        BackendError: TensorRT could not take a graph, with the findings; or the build failed.
    """
    options = options or Options()
    models = _models(folder)
    copies = {name: adapted(model) for name, model in models.items()}
    targets = {name: copies[name] or model for name, model in models.items()}
    made = profiles.profiles(targets, ranges)
    largest = {name: sizes[2] for name, sizes in ranges.items()}
    report = _lint(targets, tensorrt, largest)
    given = _references(targets, references or {})
    jobs = [
        Job(
            name,
            name + (COPY if copies[name] else ".onnx"),
            made[name],
            f"{name}.in.json" in given,
            bool(plugin.kernels(model)),
        )
        for name, model in models.items()
    ]
    kernels = {name: kernel for model in models.values() for name, kernel in plugin.kernels(model).items()}
    files = {
        **given,
        "lint.json": _json(report),
        "profiles.json": _json(profiles.to_json(made, ranges)),
        "trtexec.sh": trtexec_script(jobs, options).encode(),
        **(plugin.files(kernels) if kernels else {}),
    }
    for name, copy in copies.items():
        if copy:
            write_whole(folder / f"{name}{COPY}", copy.SerializeToString())
    if has_polygraphy():
        files |= {f"build_{job.graph}.py": polygraphy_script(job, options, folder).encode() for job in jobs}
        files["build_trt.py"] = build_script().encode()
    status = _prepared(jobs)
    _write(folder, {**files, "status.json": _json(asdict(status))})
    if status.missing:
        return status
    _build(folder, jobs)
    status = Status(BUILT, (), status.command, tuple(job.engine for job in jobs))
    write_whole(folder / FOLDER / "status.json", _json(asdict(status)))
    return status


def axes(folder: Path) -> set[str]:
    """Names of the symbolic dimensions that a package's graphs take; ArtifactError as for `prepare`."""
    shapes = [s for name, m in _models(folder).items() for s in profiles.symbolic_dims(m, name).values()]
    return {size for shape in shapes for size in shape if isinstance(size, str)}


def importable() -> bool:
    """Whether TensorRT itself can be imported; a placeholder of its name is not it."""
    try:
        import tensorrt
    except Exception:  # A library that does not load has errors of any kind.
        return False
    return hasattr(tensorrt, "Builder")


def _models(folder: Path) -> dict[str, onnx.ModelProto]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder")
    paths = [p for p in sorted(folder.glob("*.onnx")) if not p.name.endswith(COPY)]
    if not paths:
        raise ArtifactError(f"{folder} holds no ONNX graphs; export it with the onnx backend first")
    for path in paths:
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link")
    models = {path.stem: read(path) for path in paths}
    for name, model in models.items():
        for word in (name, *(info.name for info in model.graph.input)):
            if not PLAIN.fullmatch(word) or name == FOLDER:
                raise ArtifactError(f"{folder}: {word!r} is no name for a graph or an input")
    return models


def _lint(models: Mapping[str, onnx.ModelProto], tensorrt: str | None, largest: Mapping[str, int]) -> dict[str, Any]:
    found = {name: lint.lint(model, tensorrt, largest) for name, model in models.items()}
    lines = [f"{name}: {finding}" for name, findings in found.items() for finding in findings]
    if lines:
        rest = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise BackendError(f"TensorRT does not take what is exported: {'; '.join(lines[:3])}{rest}")
    table = operators()
    graphs = {name: lint.to_json(found[name], model) for name, model in models.items()}
    return {"tensorrt": tensorrt or table.tensorrt, "sources": dict(table.sources), "graphs": graphs}


def _references(
    models: Mapping[str, onnx.ModelProto], references: Mapping[str, tuple[Arrays, Arrays]]
) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, (inputs, outputs) in references.items():
        if name not in models:
            raise ArtifactError(f"references are for {name}; the graphs are {', '.join(models)}")
        graph = models[name].graph
        taken = {info.name for info in graph.input}  # an input that nothing reads was left out of the graph
        for given, there in ((taken & set(inputs), graph.input), (set(outputs), graph.output)):
            if given != {info.name for info in there}:
                raise ArtifactError(f"references of {name} must be for {', '.join(i.name for i in there)}")
        asked = {label: value for label, value in inputs.items() if label in taken}
        files |= {f"{name}.in.json": inputs_json(asked), f"{name}.out.json": outputs_json(outputs)}
    return files


def _prepared(jobs: list[Job]) -> Status:
    scripts = has_polygraphy()
    missing = [] if importable() else ["TensorRT (import tensorrt fails)"]
    missing += [] if scripts else ["Polygraphy (pip install polygraphy), which writes build_trt.py"]
    return Status(PREPARED, tuple(missing), COMMAND if scripts else f"sh {FOLDER}/trtexec.sh", ())


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put the whole of `trt/` in place of what was there, timings of earlier builds excepted."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from None
    target, old = folder / FOLDER, work / "old"
    try:
        new = work / FOLDER
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        timings = target / "timing.cache"
        if timings.is_file() and not timings.is_symlink():
            shutil.copyfile(timings, new / "timing.cache")
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build(folder: Path, jobs: list[Job]) -> None:
    """Run the scripts, which build, save and compare. Not run here: no machine of ours has had TensorRT yet."""
    package = folder.resolve()
    log = package / FOLDER / "build.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(package / FOLDER / "build_trt.py")]
        done = subprocess.run(command, cwd=package, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise BackendError(f"TensorRT was not built, though everything for it is prepared; the reason is in {log}")
    missing = [job.engine for job in jobs if not (folder / job.engine).is_file()]
    if missing:
        raise BackendError(f"the build ended without {', '.join(missing)}")


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
