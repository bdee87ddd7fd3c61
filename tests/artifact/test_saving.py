"""Saving and loading: the same model comes back, and what cannot be saved leaves nothing behind."""

from __future__ import annotations

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
from tests.artifact.conftest import SMALL, manifest_of, saved
from tests.ir.programs import PIPELINES, llava, model, optimized, weightless

EVERYTHING = PIPELINES[-1]


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


def test_a_saved_folder_holds_exactly_the_files_that_are_listed(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {*artifact.FILES, artifact.MANIFEST}
    assert set(manifest_of(whole)["files"]) == set(artifact.FILES)
    assert not list(whole.parent.glob(".*"))


def test_a_pipeline_without_effect_on_weights_stores_the_models_own(tmp_path: Path) -> None:
    source, opt = model(), optimized("cut-visual{from_layer=1}")
    stored = load_file(saved(opt, tmp_path / "saved") / "model.safetensors")
    own = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    assert all(torch.equal(value, own[name]) for name, value in stored.items())


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
