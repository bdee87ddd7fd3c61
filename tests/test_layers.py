"""Layers import downwards only, and heavy imports stay out of the way of `foveate --help`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "foveate"

# What each part may import from foveate, besides itself.
BASE = {"errors", "files", "manifest", "ops", "neighborhood"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "manifest": {"errors"},
    "ops": set(),
    "positions": {"errors"},
    "neighborhood": set(),
    "ir": BASE,
    "kernels": BASE,
    "models": BASE | {"ir"},
    "passes": BASE | {"ir", "kernels"},
    "backends": BASE | {"ir", "kernels"},
    "runner": {"errors", "manifest", "backends", "positions"},
    "cache": BASE,
    "streams": BASE | {"ir"},
    "labels": BASE | {"streams"},
    "clip": {"errors", "passes"},
    "intervals": set(),
    "metrics": {"examples", "intervals"},
    "answers": {"errors", "examples"},
    "generation": BASE | {"ir", "cache", "models"},
    "steps": BASE | {"backends", "cache"},
    "ragged": BASE | {"backends", "streams"},
    "prompts": BASE | {"ir", "backends", "models", "streams", "labels", "positions"},
    "model": BASE
    | {
        "ir",
        "backends",
        "cache",
        "models",
        "positions",
        "prompts",
        "ragged",
        "streams",
        "labels",
        "generation",
        "steps",
        "artifact",
        "report",
    },
}
EVERYTHING = {
    "api",
    "artifact",
    "calibrate",
    "cli",
    "report",
    "bench",
    "evaluate",
    "examples",
    "learn",
    "loading",
    "lmms",
    "machine",
    "package",
    "serving",
    "train",
} | {"__init__"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.split(".")[1] for name in found if name.startswith("foveate.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_lies_below_it(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in EVERYTHING:
        return
    assert part in ALLOWED, f"say in this test what {part} may import"
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    wrong = (imported(path) & parts) - ALLOWED[part] - {part}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_importing_foveate_and_the_command_line_does_not_import_torch():
    code = "import sys, foveate, foveate.cli.main; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
