"""What is loaded over numpy arrays is what was exported, and neither torch nor transformers is imported for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import foveate
from foveate import manifest
from foveate.errors import ArtifactError, BackendError, FoveateError
from foveate.models.random import random_inputs
from tests.ir.programs import model
from tests.runner.conftest import Packaged, arrays

GRAPHS = [file for name, file in manifest.GRAPHS.items() if name != "vision_rest"]


@pytest.fixture
def copy(packaged: Packaged, tmp_path: Path) -> Path:
    """A package to be damaged."""
    return Path(shutil.copytree(packaged(""), tmp_path / "copy"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def linked(path: Path) -> None:
    moved = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink, linked, as_folder])
@pytest.mark.parametrize("name", [*manifest.FILES, *GRAPHS])
def test_every_damage_is_an_error_that_names_the_file(damage: Callable[[Path], None], name: str, copy: Path) -> None:
    damage(copy / name)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        foveate.load(copy, tensors="np")


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries of the manifest; `...` removes one."""
    path = folder / manifest.MANIFEST
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, as someone who means harm would."""
    names = [*manifest.FILES, *GRAPHS]
    rewrite(folder, files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": 2}, ArtifactError, "has format 2; this foveate reads format 1"),
        ({"files": {"../../etc/passwd": "0" * 64}}, ArtifactError, "must list these files"),
        ({"files": ...}, ArtifactError, "must list these files"),
        ({"passes": ...}, ArtifactError, r"foveate\.json is damaged"),
        ({"passes": ["fastv"]}, ArtifactError, r"foveate\.json is damaged"),
        ({"prompts": {"image_token_id": 4}}, ArtifactError, "prompts must have these numbers: image_token_id"),
        ({"prompts": ...}, BackendError, "says nothing of its prompts"),
        ({"backend": ...}, BackendError, "is no exported package"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_error(
    changes: dict[str, Any], error: type[FoveateError], message: str, copy: Path
) -> None:
    rewrite(copy, **changes)
    with pytest.raises(error, match=message):
        foveate.load(copy, tensors="np")


def test_a_file_that_the_manifest_does_not_list_is_not_read(copy: Path) -> None:
    (copy / "vision_rest.onnx").write_bytes(b"no graph")
    assert "vision_rest" not in foveate.load(copy, tensors="np").graphs


@pytest.mark.parametrize("tensors", ["np", "pt"])
@pytest.mark.parametrize("harm", ["no graph", "weights outside"])
def test_graphs_that_were_made_to_harm_are_one_error(harm: str, tensors: Any, copy: Path) -> None:
    path = copy / "decoder_step.onnx"
    if harm == "no graph":
        path.write_bytes(b"no graph")
    else:
        shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
        graph = onnx.load(path, load_external_data=False)
        for weight in graph.graph.initializer:
            for entry in weight.external_data:
                if entry.key == "location":
                    entry.value = "../outside.safetensors"
        path.write_bytes(graph.SerializeToString())
    rehash(copy)
    with pytest.raises(ArtifactError, match=r"decoder_step\.onnx cannot be opened by ONNX Runtime"):
        foveate.load(copy, tensors=tensors)


WITHOUT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it fails from here on
import numpy as np
import foveate
with np.load({inputs!r}) as inputs:
    found = foveate.load({folder!r}, tensors="np").generate(**inputs, max_new_tokens=6)
np.save({output!r}, found)
print(sorted(name for name in ("torch", "transformers", "onnx") if sys.modules.get(name)))
"""


REST = ("torch", "transformers", "onnx", "safetensors", "PIL", "yaml", "rich", "click")
"""What foveate needs elsewhere."""


@pytest.mark.parametrize("blocked", [(), REST], ids=["free", "blocked"])
def test_neither_torch_nor_transformers_is_needed(blocked: tuple[str, ...], packaged: Packaged, tmp_path: Path) -> None:
    folder = packaged("fastv{layer=1,keep=0.5},cut-visual{from_layer=2}")
    inputs = arrays(random_inputs(model(), batch=2, images_per_row=[2, 1], padding="left"))
    np.savez(tmp_path / "inputs.npz", **inputs)
    names = {"inputs": tmp_path / "inputs.npz", "folder": folder, "output": tmp_path / "ids.npy"}
    code = WITHOUT.format(blocked=blocked, **{name: str(path) for name, path in names.items()})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    expected = foveate.load(folder, tensors="np").generate(**inputs, max_new_tokens=6)
    assert np.array_equal(np.load(tmp_path / "ids.npy"), expected)
