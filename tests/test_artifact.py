"""Saving and loading: the same model comes back, or one clear error does."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import foveate
from foveate import artifact
from foveate.errors import ArtifactError, FoveateError
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from tests.ir.programs import PIPELINES, llava, model, optimized, weightless

EVERYTHING = PIPELINES[-1]
SMALL = ("drop-visual-heads{keep=2,from_layer=0},fastv{layer=1,keep=0.5}", 2, 2)
"""Pipeline, key heads and layers of the program that is damaged in many ways."""


def saved(opt: OptimizedModel, folder: Path) -> Path:
    opt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program that nobody changes."""
    return saved(optimized(*SMALL), tmp_path_factory.mktemp("whole") / "saved")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A saved program to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def prompts() -> list[dict[str, Tensor]]:
    source = model()
    return [
        random_inputs(source),
        random_inputs(source, batch=3, images_per_row=[2, 0, 1], padding="left"),
        random_inputs(source, images=0),
    ]


@pytest.mark.parametrize("pipeline", ["", "fastv{layer=1,keep=0.5}", EVERYTHING])
def test_a_loaded_model_gives_the_same_bits(pipeline: str, tmp_path: Path) -> None:
    opt = optimized(pipeline)
    back = foveate.load(saved(opt, tmp_path / "new" / "folder"))
    for inputs in prompts():
        assert torch.equal(opt(**inputs).logits, back(**inputs).logits)
        tokens = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (opt, back)]
        assert torch.equal(*tokens)
    assert back.program.to_text() == opt.program.to_text()
    assert back.program.passes == opt.program.passes
    assert back.program.info == opt.program.info
    assert str(back.report()) == str(opt.report())
    assert back.config.to_dict() == opt.config.to_dict()
    assert back.generation_config.to_dict() == opt.generation_config.to_dict()
    assert {n for n, _ in back.named_parameters()} <= {n for n, _ in opt.named_parameters()}


def test_saving_what_was_loaded_gives_the_same_files(whole: Path, tmp_path: Path) -> None:
    again = saved(foveate.load(whole), tmp_path / "again")
    for name in (*artifact.FILES, artifact.MANIFEST):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_bfloat16_comes_back_bit_by_bit(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    source = llava(layers=2, dtype=dtype)
    opt = foveate.optimize(source, "fastv{layer=1,keep=0.5}")
    back = foveate.load(saved(opt, tmp_path / "saved"))
    inputs = random_inputs(source)
    assert back.dtype == dtype
    assert back(**inputs).logits.dtype == dtype
    assert torch.equal(opt(**inputs).logits, back(**inputs).logits)


def test_each_weight_is_stored_once_and_none_without_use(whole: Path) -> None:
    program = optimized(*SMALL).program
    stored = load_file(whole / "model.safetensors")
    assert set(stored) == program.used_weights()
    expected = sum(program.weights.get(name).nbytes for name in stored)
    assert expected <= (whole / "model.safetensors").stat().st_size <= expected + 200 * len(stored)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    config = random_llava(layers=2, hidden=32, heads=4, ffn=48, vocab=2048, device="meta").config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    source = LlavaForConditionalGeneration(config).eval()
    opt = foveate.optimize(source)
    folder = saved(opt, tmp_path / "saved")
    head = source.lm_head.weight
    assert head.data_ptr() == source.get_input_embeddings().weight.data_ptr()
    unique = {p.data_ptr(): p.nbytes for p in source.parameters()}
    assert (folder / "model.safetensors").stat().st_size < sum(unique.values()) + head.nbytes // 2
    inputs = random_inputs(source)
    assert torch.equal(foveate.load(folder)(**inputs).logits, opt(**inputs).logits)


def test_the_models_weights_are_not_touched_by_saving_and_loading(whole: Path, tmp_path: Path) -> None:
    source = model()
    before = {name: (p.data_ptr(), p._version) for name, p in source.named_parameters()}
    saved(optimized(*SMALL), tmp_path / "saved")
    foveate.load(whole)
    assert {name: (p.data_ptr(), p._version) for name, p in source.named_parameters()} == before


# --- saving that fails ----------------------------------------------------------------------------------


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(28, "No space left on device"), ArtifactError, "cannot be written: No space left on device"),
        (OSError("disk on fire"), ArtifactError, "disk on fire"),
        (RuntimeError("out of memory"), RuntimeError, "out of memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_saving_that_fails_half_way_leaves_nothing(
    error: BaseException,
    expected: type[BaseException],
    message: str,
    early: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        if not early:
            save_file(*args, **options)
        raise error

    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(expected, match=message):
        optimized(*SMALL).save_pretrained(tmp_path / "saved")
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "full"])
def test_what_exists_is_not_written_over(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "full":
        (target / "mine.txt").write_text("mine")
    before = everything_in(tmp_path)
    with pytest.raises(ArtifactError, match=r"saved exists already; give a new folder"):
        optimized("").save_pretrained(target)
    assert everything_in(tmp_path) == before


def test_a_parent_that_is_a_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"saved cannot be written"):
        optimized("").save_pretrained(tmp_path / "file" / "saved")
    assert everything_in(tmp_path) == [tmp_path / "file"]


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    source, program = weightless()
    opt = OptimizedModel(program, source.config, source.generation_config)
    with pytest.raises(ArtifactError, match="meta device"):
        opt.save_pretrained(tmp_path / "saved")
    assert everything_in(tmp_path) == []


def test_options_that_saving_would_ignore_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="push_to_hub"):
        optimized("").save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert everything_in(tmp_path) == []


# --- damage -----------------------------------------------------------------------------------------------

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


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    return content


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


def test_a_saved_folder_holds_exactly_the_files_that_are_listed(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {*artifact.FILES, artifact.MANIFEST}
    assert set(manifest_of(whole)["files"]) == set(artifact.FILES)
    assert not list(whole.parent.glob(".*"))


def test_a_pipeline_without_effect_on_weights_stores_the_models_own(tmp_path: Path) -> None:
    source, opt = model(), optimized("cut-visual{from_layer=1}")
    stored = load_file(saved(opt, tmp_path / "saved") / "model.safetensors")
    own = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    assert all(torch.equal(value, own[name]) for name, value in stored.items())
