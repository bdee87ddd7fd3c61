"""Saved programs that were damaged or forged: one clear error, and no pickle."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import foveate
from foveate import artifact
from foveate.errors import ArtifactError
from tests.artifact.conftest import manifest_of
from tests.ir.programs import model

Damage = Callable[[Path], None]


def truncate(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])

    return damage


def flip(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def empty(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(b"") and None


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        moved = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def edit(folder: Path) -> None:
    path = folder / "program.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("silu", "gelu", 1), encoding="utf-8")


DAMAGES: dict[str, Damage] = {
    f"{make.__name__}-{name}": make(name)
    for make in (truncate, flip, empty, remove, link, as_folder)
    for name in artifact.FILES
}


@pytest.mark.parametrize("damage", [*DAMAGES, "edit-program.txt"])
def test_every_damage_is_an_error_that_names_the_file(damage: str, copy: Path) -> None:
    {**DAMAGES, "edit-program.txt": edit}[damage](copy)
    with pytest.raises(ArtifactError, match=damage.partition("-")[2].replace(".", r"\.")):
        foveate.load(copy)


@pytest.mark.parametrize("make", [truncate, empty, remove, link, as_folder])
def test_a_damaged_manifest_is_an_error_that_names_it(make: Callable[[str], Damage], copy: Path) -> None:
    make(artifact.MANIFEST)(copy)
    with pytest.raises(ArtifactError, match=r"foveate\.json"):
        foveate.load(copy)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest in place, or replace it by what `change` returns."""
    content = manifest_of(folder)
    replaced = change(content)
    text = json.dumps(content if replaced is None else replaced)
    (folder / artifact.MANIFEST).write_text(text, encoding="utf-8")


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, as someone who means harm would."""

    def change(content: dict[str, Any]) -> None:
        content["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in artifact.FILES}

    rewrite(folder, change)


def assign(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *outer, last = path
        for key in outer:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format 99": assign("format", value=99),
    "format as text": assign("format", value="1"),
    "no format": assign("format", value=...),
    "a list": lambda content: [content],
    "a number": lambda content: 5,
    "nothing": lambda content: {},
    "no files": assign("files", value=...),
    "files as a list": assign("files", value=["program.txt"]),
    "a file outside": assign("files", "../../etc/passwd", value="0" * 64),
    "an absolute file": assign("files", "/etc/passwd", value="0" * 64),
    "a file less": assign("files", "config.json", value=...),
    "a hash that is a number": assign("files", "config.json", value=5),
    "no passes": assign("passes", value=...),
    "passes of text": assign("passes", value=["fastv"]),
    "a pass with more fields": assign("passes", 0, "evil", value=1),
    "a pass without notes": assign("passes", 0, "notes", value=...),
    "a cost that is a list": assign("passes", 0, "cost", value=[1]),
    "a cost of three": assign("passes", 0, "cost", value={"kv_bytes": [1, 2, 3]}),
    "no parameters": assign("parameters", value=...),
    "parameters as a number": assign("parameters", value=5),
    "parameters of lists": assign("parameters", value=[[1]]),
    "a whole-number buffer as a parameter": assign("parameters", value=["model.vision_tower.embeddings.position_ids"]),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_does_not_fit_is_one_error(change: Callable[[dict[str, Any]], Any], copy: Path) -> None:
    rewrite(copy, change)
    with pytest.raises(ArtifactError) as caught:
        foveate.load(copy)
    assert copy.name in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[1, 2]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 1', b'{"format": NaN}'],
)
def test_a_manifest_that_is_no_json_object_is_one_error(content: bytes, copy: Path) -> None:
    (copy / artifact.MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"foveate\.json"):
        foveate.load(copy)


def replace(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def replace_text(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "program.txt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return damage


def change_weights(change: Callable[[dict[str, Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def renamed(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = torch.zeros(1)


EMBED = "model.language_model.embed_tokens.weight"

FORGED: dict[str, Damage] = {
    "weights that are no safetensors": replace("model.safetensors", b"\x80\x04K\x01."),
    "weights with a header of a terabyte": replace("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
    "no weights": change_weights(lambda w: w.clear()),
    "a weight less": change_weights(lambda w: w.__delitem__("lm_head.weight")),
    "no embedding": change_weights(lambda w: w.__delitem__(EMBED)),
    "a weight of another shape": change_weights(lambda w: w.update({"lm_head.weight": torch.zeros(3, 3)})),
    "an embedding of another shape": change_weights(lambda w: w.update({EMBED: torch.zeros(3, 3)})),
    "a weight of another dtype": change_weights(lambda w: w.update({"lm_head.weight": torch.zeros(64, 32).int()})),
    "a weight with a path": change_weights(lambda w: renamed(w, "../evil")),
    "a weight with a private name": change_weights(lambda w: renamed(w, "_parameters.evil")),
    "a weight that hides a method": change_weights(lambda w: renamed(w, "forward")),
    "a weight that hides names": change_weights(lambda w: renamed(w, "names")),
    "a weight inside a weight": change_weights(lambda w: renamed(w, "lm_head.weight.evil")),
    "a weight without a name": change_weights(lambda w: renamed(w, "")),
    "config that is no json": replace("config.json", b"{"),
    "config that is a list": replace("config.json", b"[]"),
    "config nested": replace("config.json", b"[" * 100_000),
    "config without a type": replace("config.json", b"{}"),
    "config of an unknown type": replace("config.json", b'{"model_type": "evil"}'),
    "config whose type is a list": replace("config.json", b'{"model_type": ["llava"]}'),
    "config with a broken part": replace("config.json", b'{"model_type": "llava", "text_config": 5}'),
    "generation that is no json": replace("generation_config.json", b"{"),
    "generation that is a list": replace("generation_config.json", b"[]"),
    "generation nested": replace("generation_config.json", b"[" * 100_000),
    "program that is no text": replace("program.txt", b"\xff\xfe"),
    "empty program": replace("program.txt", b"\n"),
    "program of one graph": replace_text("graph vision", "graph decode"),
    "graph of another name": replace_text("graph prefill", "graph evil"),
    "unknown op": replace_text("aten.silu.default", "aten.cumsum.default"),
    "python": replace_text("aten.silu.default", "__import__"),
    "no outputs": replace_text('return {"logits"', 'return {"evil"'),
    "no keys": replace_text('"kv"', '"vk"'),
    "nothing kept": replace_text('"kept"', '"kopt"'),
    "outputs that are a number": replace_text('return {"logits"', "return 5 #"),
    "outputs that are a list": replace_text('return {"logits"', "return [] #"),
    "keys that are a number": replace_text('"kv": [', '"kv": 5, "x": ['),
    "keys of pairs": replace_text('"kv": [[', '"kv": [[pre_text_slice_1, pre_text_slice_1], ['),
    "keys that are no keys": replace_text('"kv": [[', '"kv": [[1, 2, 3, 4], ['),
    "logits that are a number": replace_text('"logits": ', '"logits": 5, "x": '),
    "vision that gives nothing": replace_text('return {"out"', 'return {"in"'),
    "input of another name": replace_text("pixel_values", "pixels"),
    "stream of another name": replace_text("visual_position_ids", "visual_positions"),
    "softmax over tokens": replace_text("aten.silu.default(l0_text_linear_5)", "aten.softmax.int(l0_text_linear_5, 1)"),
    "layout of another length": replace_text('"t:t"', '"t:vt"'),
    "layout that is unknown": replace_text('"t:t"', '"x:y"'),
    "layout that is a number": replace_text('"t:t"', "5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", FORGED.values(), ids=FORGED)
def test_a_forged_file_with_the_right_hash_is_one_error(damage: Damage, copy: Path) -> None:
    damage(copy)
    rehash(copy)
    with pytest.raises(ArtifactError) as caught:
        foveate.load(copy)
    assert copy.name in str(caught.value) or "program text" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "hugging face"])
def test_what_is_no_saved_program_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "thing"
    if kind == "file":
        target.write_text("hello")
    elif kind == "empty":
        target.mkdir()
    elif kind == "hugging face":
        model().save_pretrained(target)
    messages = {"empty": "was not saved by foveate", "hugging face": "was not saved by foveate"}
    with pytest.raises(ArtifactError, match=rf"thing.* {messages.get(kind, 'is not a folder')}"):
        foveate.load(target)


@pytest.fixture
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    yield


@pytest.mark.usefixtures("_no_pickle")
def test_loading_reads_no_pickle_even_when_one_lies_there(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": 1}))
    foveate.load(copy)
