"""What MODEL may be, and what is said of everything that it may not be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from foveate.cli import models
from foveate.cli.errors import UseError
from foveate.cli.models import load_model
from foveate.errors import UnsupportedModelError
from tests.cli.conftest import LAYERS, Run


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert isinstance(loaded.model, LlavaForConditionalGeneration)
    assert not loaded.model.training
    assert loaded.get_processor().image_token == "<image>"


def test_random_llava_takes_sizes() -> None:
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "visual_tokens": 16}
    loaded = load_model("random:llava", sizes, "bfloat16")
    text = loaded.model.config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_key_value_heads) == (2, 64, 2)
    assert str(loaded.model.dtype) == "torch.bfloat16"
    with pytest.raises(UseError, match="no processor"):
        loaded.get_processor()


@pytest.mark.parametrize(
    ("sizes", "said"), [({"hidden": 65}, "multiple of 2 \\* heads"), ({"visual_tokens": 10}, "square number")]
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(UseError, match=said):
        load_model("random:llava", sizes)


def test_sizes_of_another_model(folder: Path) -> None:
    with pytest.raises(UseError, match="--layers is a size of random:llava"):
        load_model(str(folder), {"layers": 2})


@pytest.mark.parametrize("name", ["digit", "./nowhere", "~/nowhere", "/no/where", "a/b/c", "tests/nowhere"])
def test_a_path_that_is_not_there_never_asks_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_download", lambda name: pytest.fail(f"asked the Hub for {name}"))
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UseError, match="there is no folder"):
        load_model(name)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UseError, match="cannot be reached"):
        load_model("someone/some-model")


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)

    def cached(name: str, local_files_only: bool, **options: object) -> str:
        assert local_files_only
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert load_model("someone/some-model").model.config.text_config.num_hidden_layers == LAYERS


def test_a_file(image: Path) -> None:
    with pytest.raises(UseError, match="is a file"):
        load_model(str(image))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UseError, match=r"has no config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("text", "said"), [("{", "JSON"), ("[]", "its model_type"), ('{"model_type": 3}', "its")])
def test_a_config_that_is_none(copy: Path, text: str, said: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(UseError, match=said):
        load_model(str(copy))


def test_a_family_that_is_not_supported(run: Run, copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        load_model(str(copy))
    result = run("optimize", copy, "--passes", "", "-o", copy / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: model family 'bert'")
    assert "supported: gemma3, idefics3, internvl, llava" in result.stderr


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UseError, match=r"no \*\.safetensors"):
        load_model(str(copy))


def test_damaged_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UseError, match="cannot be read"):
        load_model(str(copy))


def test_weights_that_are_missing(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = LAYERS + 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UseError, match=r"incomplete: \d+ are missing"):
        load_model(str(copy))


def test_a_folder_without_a_processor(copy: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(UseError, match="no processor"):
        load_model(str(copy)).get_processor()


def test_remote_code_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    assert isinstance(load_model(str(copy)).model, LlavaForConditionalGeneration)
