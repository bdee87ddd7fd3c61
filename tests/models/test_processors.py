"""Folders with transformers' own processors: real images go through them, and are answered as by transformers."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoProcessor

import foveate
from foveate.cli.main import cli
from foveate.examples import model_inputs
from foveate.model import OptimizedModel
from tests.models import processors
from tests.models.processors import IMAGES, WHOLE, picture

whole = pytest.mark.parametrize("name", WHOLE)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, as `from_pretrained` reads it, and an image."""
    root = tmp_path_factory.mktemp("families")
    picture(70, 50).save(root / "image.png")
    for name, each in WHOLE.items():
        each.model().save_pretrained(root / name)
        each.processor().save_pretrained(root / name)
    return root


def command(*args: object) -> Any:
    """What `foveate ... --json` prints."""
    result = CliRunner().invoke(cli, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@whole
def test_a_folder_answers_what_transformers_answers(folders: Path, name: str) -> None:
    model, processor = WHOLE[name].model(), AutoProcessor.from_pretrained(folders / name)
    prompt = f"what {WHOLE[name].mark} is there ?"
    told = command("run", folders / name, "--image", folders / "image.png", "--prompt", prompt, "--max-new-tokens", 4)
    inputs = processor(text=[prompt], images=[picture(70, 50)], return_tensors="pt")
    ids = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert told["answer"] == processor.decode(ids, skip_special_tokens=True).strip()
    assert told["visual_tokens"] == int((inputs["input_ids"] == model.config.image_token_id).sum()) > 0


@pytest.mark.slow
@whole
def test_what_is_optimized_and_saved_gives_the_logits_of_transformers(folders: Path, name: str, tmp_path: Path) -> None:
    """With its processor, and with images of several sizes in prompts of several lengths."""
    command("optimize", folders / name, "--passes", "", "-o", tmp_path / "saved")
    model, mine = WHOLE[name].model(), foveate.load(tmp_path / "saved")
    assert isinstance(mine, OptimizedModel)
    processor, mark = AutoProcessor.from_pretrained(tmp_path / "saved"), WHOLE[name].mark
    prompts = [f"what {mark} is there ?", f"{mark} and {mark} ?"]
    first, *rest = [picture(70, 50), picture(20, 90), picture(24, 24)]
    images = [first, *rest] if name == "llava-next" else [[first], rest]  # that one takes them in one row
    inputs = model_inputs(mine, processor(text=prompts, images=images, padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1:]
        torch.testing.assert_close(mine(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(mine.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    pruned = foveate.optimize(model, "cut-visual{from_layer=2}")
    assert pruned.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_a_real_image_processor_give_the_logits_of_transformers(name: str) -> None:
    """Families whose whole processors need torchvision: with as many image tokens as transformers makes features."""
    make, images = IMAGES[name]
    model, pictures = make(), [picture(70, 50), picture(40, 64)]
    mine = foveate.optimize(model, "")
    made = model_inputs(mine, images([pictures] if name == "smolvlm" else pictures, return_tensors="pt"))
    with torch.no_grad():
        features = model.get_image_features(**made).pooler_output
    parts = [[*[model.config.image_token_id] * len(each), 10] for each in features]
    ids = torch.tensor([[1, 9, *itertools.chain(*parts), 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
    theirs = dict(inputs)
    if "image_grid_thw" in made:
        theirs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        expected = model(**theirs).logits[:, -1:]
        torch.testing.assert_close(mine(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(mine.generate(**inputs, **GREEDY), model.generate(**theirs, **GREEDY))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there, so nothing is missing")
def test_a_processor_that_needs_what_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    make, images = IMAGES["qwen2-vl"]
    make().save_pretrained(tmp_path)
    processors.tokenizer().save_pretrained(tmp_path)
    images.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "Qwen2VLProcessor"}))
    picture(20, 20).save(tmp_path / "image.png")
    args = ["run", tmp_path, "--image", tmp_path / "image.png", "--prompt", "what ?"]
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 2
    assert "has no processor that can be read: Qwen2VLVideoProcessor requires the Torchvision library" in result.stderr
