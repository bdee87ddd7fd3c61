"""lmms-eval asks foveate's models: a task on local files gives what `foveate eval` gives on the same questions."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="the extra foveate[lmms] is not installed")

from foveate.errors import FoveateError
from foveate.lmms import Foveate, manifest
from foveate.models import digits
from tests.cli.conftest import Run, run  # noqa: F401  # a fixture

RECIPE = "fastv{layer=3,keep=0.25},cut-visual{from_layer=8}"
ASKED = 12

TASK = """
task: digits_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
"""
UTILS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["path"])]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, its data, and the same questions for `foveate eval`."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "utils.py").write_text(UTILS)
    drawn = [s for task in ("row", "lookup") for s in digits.samples(task=task, n=ASKED // 2, seed=7)]
    for number, sample in enumerate(drawn):
        sample.image.save(path / f"{number}.png")
    rows = [{"image": f"{i}.png", "prompt": s.question, "answer": s.answer} for i, s in enumerate(drawn)]
    (path / "same.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = path / "same.json"
    data.write_text("\n".join(json.dumps({**row, "path": str(path / row["image"])}) for row in rows))
    (path / "digits_local.yaml").write_text(TASK.format(data=data))
    return path


@pytest.fixture(scope="module")
def reader() -> Foveate:
    return Foveate("digits", batch_size=4, device="cpu")


def test_lmms_eval_knows_the_model() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    assert manifest().simple_class_path == "foveate.lmms.Foveate"
    found = entry_points(group="lmms_eval.models", name="foveate")
    assert [entry.value for entry in found] == ["foveate.lmms:manifest"]
    assert MODEL_REGISTRY_V2.resolve("foveate").class_path == "foveate.lmms.Foveate"
    assert get_model("foveate") is Foveate


@pytest.mark.slow
def test_a_task_on_local_files_gives_what_foveate_eval_gives(
    run: Run,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    told = simple_evaluate(
        model="foveate",
        model_args=f'pretrained=digits,passes="{RECIPE}",device=cpu',
        tasks=["digits_local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
    )
    replies = tmp_path / "replies.jsonl"
    asked = ("--data", folder / "same.jsonl", "-p", RECIPE, "--new-tokens", 5, "-o", replies)
    expected = json.loads(run("eval", "digits", *asked, "--json").stdout)["optimized"]
    assert told["results"]["digits_local"]["exact_match,none"] == pytest.approx(expected["accuracy"])
    assert 0 < expected["accuracy"] < 1, "else any two would agree"
    said = [row["said"] for row in map(json.loads, replies.read_text().splitlines()) if row.get("passes") == RECIPE]
    found = sorted(told["samples"]["digits_local"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in found] == said


def request(reader: Foveate, text: str, options: Any, images: list[Any]) -> Any:
    reader.task_dict = {"t": {"test": {0: images}}}
    return SimpleNamespace(args=(text, options, list, 0, "t", "test"))


def test_stop_words_sampling_and_order(reader: Foveate) -> None:
    (sample,) = digits.samples(task="row", n=1, seed=7)
    whole = {"max_new_tokens": 5, "temperature": 0, "top_p": None, "image_aspect_ratio": "pad"}
    asked = [whole, {**whole, "until": [" "]}, whole, {**whole, "temperature": 0.01, "until": "\n"}]
    said = reader.generate_until([request(reader, sample.question, options, [sample.image]) for options in asked])
    assert said == [sample.answer, sample.answer.split()[0], sample.answer, sample.answer]
    marked = reader.generate_until([request(reader, f"<image>\n{sample.question}", whole, [sample.image])])
    assert marked == said[:1]


def test_what_cannot_be_asked_is_told(reader: Foveate) -> None:
    image = Image.new("RGB", (8, 8))
    for text, images, message in (
        ("<image> <image> a", [image], "t, document 0: the text holds 2 <image> for 1 images"),
        ("a", ["film.mp4"], "t, document 0 comes with a str; foveate reads images"),
    ):
        with pytest.raises(FoveateError, match=message):
            reader.generate_until([request(reader, text, {}, images)])
    with pytest.raises(FoveateError, match="one round: tasks of output_type generate_until_multi_round"):
        reader.generate_until_multi_round([])
    with pytest.raises(FoveateError, match="loglikelihood and multiple_choice cannot be asked"):
        reader.loglikelihood([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "nowhere"}, "there is no folder nowhere"),
        ({"pretrained": "digits", "passes": "blur"}, "there is no pass 'blur'"),
        ({"pretrained": "digits", "cut-visual{from_layer": "8}"}, "no argument 'cut-visual{from_layer'; there are"),
        ({"pretrained": "digits", "batch_size": "auto"}, "batch_size=auto: give a number"),
    ],
)
def test_wrong_arguments_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Foveate(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FoveateError, match="one process"):
        Foveate("digits")
