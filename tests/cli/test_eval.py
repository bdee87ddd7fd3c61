"""`foveate eval`: lines of images, prompts and answers, by every metric, interrupted and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.answers import Answers
from foveate.models.digits import samples
from tests.cli.conftest import Run, said_in

ASKED = 5
FEW = ("--new-tokens", 5, "--batch", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions about digits, one of them about two images at once."""
    folder = tmp_path_factory.mktemp("data")
    drawn = samples(n=ASKED, seed=5)
    for number, sample in enumerate(drawn):
        sample.image.save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"image": f"{i}.png", "prompt": s.question, "answer": s.answer, "id": i} for i, s in enumerate(drawn)
    ]
    rows[3] = {"images": ["0.png", "1.png"], "prompt": "how many 3\u2028are there ?", "answers": ["3", "three"]}
    write(folder / "a.jsonl", rows)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:400])
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


def told(run: Run, *args: object) -> dict[str, Any]:
    result = run("eval", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def replies(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def nobody(*args: Any, **options: Any) -> None:
    raise AssertionError("nobody should be asked, nor optimized")


def test_recipes_beside_the_dense_model(run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, recipe = tmp_path / "said.jsonl", "cut-visual{from_layer=1}"
    setting = ("digits", "--data", data, "-p", "", "-p", recipe, *FEW, "-o", out)
    found = told(run, *setting)
    dense, same, pruned = found["dense"], *(each["score"] for each in found["recipes"])
    assert [each["passes"] for each in found["recipes"]] == ["", recipe]
    assert same == found["optimized"] == dense and found["agreement"] == found["recipes"][0]["agreement"] == 1
    assert (dense["n"], pruned["n"], found["metric"], found["passes"]) == (ASKED, ASKED, "exact", "")
    assert dense["accuracy"] > pruned["accuracy"], "it is blind from layer 1 on"
    rows = replies(out)
    assert len(rows) == 3 * ASKED
    assert [row["id"] for row in rows[:ASKED]] == ["0", "1", "2", "line 4", "4"]
    by_passes = {passes: [row["said"] for row in rows if row["passes"] == passes] for passes in (None, "", recipe)}
    assert by_passes[None] == by_passes[""]
    same_words = [a == b for a, b in zip(by_passes[None], by_passes[recipe], strict=True)]
    assert found["recipes"][1]["agreement"] == sum(same_words) / ASKED

    monkeypatch.setattr("foveate.evaluate.ask", nobody)
    monkeypatch.setattr("foveate.optimize", nobody, raising=False)
    assert told(run, *setting, "--resume") == found, "a finished file is not asked again"
    shown = run("eval", *setting, "--resume").stdout
    for words in ("95%", f"B: {recipe}", "dense and A say the same to 100.0% of 5 questions", f"replies are in {out}"):
        assert words in shown


def test_a_saved_folder_is_alone_on_other_data(run: Run, saved: Path, data: Path) -> None:
    found = told(run, saved, "--data", data, *FEW)
    assert (found["dense"], found["agreement"], found["optimized"]["n"]) == (None, None, ASKED)
    assert found["optimized"] == found["recipes"][0]["score"]
    assert found["passes"] == found["recipes"][0]["passes"] != ""


def test_replies_are_marked_by_the_metric(run: Run, data: Path, tmp_path: Path) -> None:
    """The data's answers are made of what the model says, so every mark is known."""
    out = tmp_path / "said.jsonl"
    told(run, "digits", "--data", data / "a.jsonl", *FEW, "-n", 3, "-o", out)
    said = [row["said"] for row in replies(out)]
    assert all(said), "this model says something"
    lines = [json.loads(line) for line in (data / "a.jsonl").read_text().splitlines()[:3]]
    base = [{"image": str(data / row["image"]), "prompt": row["prompt"]} for row in lines]

    def scored(name: str, *args: object, **keys: list[Any]) -> dict[str, Any]:
        rows = [{**row, **{key: values[i] for key, values in keys.items()}} for i, row in enumerate(base)]
        return dict(told(run, "digits", "--data", write(tmp_path / f"{name}.jsonl", rows), *FEW, *args)["dense"])

    exact = scored("exact", answer=[said[0].upper() + ".", "nothing", said[2]])
    assert exact["accuracy"] == pytest.approx(2 / 3)
    assert exact["intervals"]["accuracy"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    people = [[said[0]] * 2 + ["x"] * 8, [said[1]] * 10, ["x"] * 10]
    assert scored("vqa", "--metric", "vqa", answers=people)["accuracy"] == pytest.approx(1.6 / 3)
    choices = scored("choice", choices=[[text, "other words"] for text in said], answer=["A", "A", "other words"])
    assert choices["accuracy"] == pytest.approx(2 / 3)
    yes_no = scored("yes-no", "--metric", "yes-no", answer=["yes", "no", "yes"])
    assert {"accuracy", "precision", "recall", "f1", "yes_ratio", "unclear"} == set(yes_no["intervals"])
    assert (yes_no["yes_ratio"], yes_no["unclear"], yes_no["recall"]) == (1, 1, 1), "it says neither"


def test_an_interrupted_run_goes_on(
    run: Run, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = (folder, "--data", data, *FEW)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = told(run, *setting, "-o", whole)
    assert (expected["optimized"], expected["recipes"], expected["passes"]) == (None, [], None)
    asked: list[str] = []
    add = Answers.add

    def interrupted(self: Answers, passes: Any, questions: Any, said: Any) -> None:
        if len(asked) >= 2:
            raise KeyboardInterrupt
        asked.extend(question.id for question in questions)
        add(self, passes, questions, said)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", interrupted)
        assert run("eval", *setting, "-o", cut).exit_code == 130
    assert len(replies(cut)) == 2
    with cut.open("a") as file:
        file.write('{"passes": null, "id": "4", "sa')
    refused = run("eval", *setting, "-o", cut)
    assert refused.exit_code == 2 and "go on with --resume" in refused.stderr
    assert told(run, *setting, "-o", cut, "--resume") == {**expected, "output": str(cut)}
    assert cut.read_text() == whole.read_text()
    other = run("eval", *setting[:-4], "--new-tokens", 4, "-o", cut, "--resume")
    assert other.exit_code == 2
    assert said_in(other) == [f"error: {cut} was begun with new tokens 5, not 4; ask the same, or give another file"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        (r'{"prompt": "a", "answer": "\ud800"}', "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: there is neither 'answer' or 'answers'"),
        ('{"prompt": "a", "answer": "b", "answers": ["b"]}', "line 2: give one of 'answer' or 'answers'"),
        ('{"prompt": "a", "answer": ["b"]}', "line 2: 'answer' must be text, not empty"),
        ('{"prompt": "a", "answer": " "}', "line 2: 'answer' must be text, not empty"),
        ('{"prompt": "a", "answers": "b"}', "line 2: 'answers' must be a list of texts"),
        ('{"prompt": "a", "answers": ["b", 3]}', "line 2: 'answers' must be a list of texts"),
        ('{"answer": "b"}', "line 2: 'prompt' is missing"),
        ('{"prompt": "a", "answer": "b", "question": "c"}', "line 2: unknown key 'question'"),
        (
            '{"prompt": "a", "answer": "e", "choices": ["c", "d"]}',
            "line 2: the answer 'e' is none of the choices: c, d",
        ),
        (
            '{"prompt": "a", "answer": "C", "choices": ["x", "y"]}',
            "line 2: the answer 'C' is none of the choices: x, y",
        ),
        ('{"prompt": "a", "answer": "b", "choices": ["b", "B."]}', "line 2: 'choices' must be 2 to 26 that differ"),
        ('{"prompt": "a", "answer": "b", "choices": "ab"}', "line 2: 'choices' must be a list of texts"),
        ('{"prompt": "a", "answer": "b", "choices": ["b", "c"]}', "line 1: there are no 'choices'"),
        ('{"prompt": "a", "answer": "b", "id": 1}', "line 2: the id '1' is that of"),
        ('{"prompt": "a", "answer": "b", "id": null}', "line 2: 'id' must be text or a whole number"),
        ('{"prompt": "a", "answer": "b", "image": "gone.png"}', "line 2: there is no image"),
        ('{"prompt": "a", "answer": "b", "image": "cut.png"}', "is not an image that Pillow can read"),
        ('{"prompt": "a", "answer": "b", "image": "' + "x" * 300 + '.png"}', "line 2: the image"),
        ('{"prompt": "a", "answer": "b", "image": "~nobody/x.png"}', "line 2: there is no image"),
        ('{"prompt": "<image> a", "answer": "b"}', "line 2: the prompt holds 1 <image> and 0 images"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_asked(
    run: Run, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr("foveate.evaluate.ask", nobody)
    path, out = tmp_path / "bad.jsonl", tmp_path / "never.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "id": "1"}\n' + line.replace("cut.png", str(data / "cut.png")))
    result = run("eval", folder, "--data", path, "-o", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(said_in(result)) == 1 and message in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "gone.jsonl"), "there is no such file or folder"),
        (("--data", "A", "--task", "row"), "--task is for digits"),
        (("--data", "A", "--seed", 1), "--seed is for digits"),
        (("--data", "A", "--metric", "choice"), "line 1: there are no 'choices'"),
        (("--data", "A", "--metric", "yes-no"), "neither yes nor no"),
        (("--metric", "f1"), "'f1' is not one of"),
        (("--metric", "choice"), "digits question 1: there are no 'choices'"),
        (("--resume",), "give --output too"),
        (("-o", "x.csv"), "must end in .jsonl"),
        (("-o", "gone/x.jsonl"), "there is no folder"),
        (("-o", "A"), "exists already"),
        (("-o", "A", "--resume"), "no file of answers"),
        (("-p", "fastv", "-p", "fastv{layer=2}"), "given twice"),
        (("-p", "cut-visual{from_layer=40}"), "from_layer=40"),
        (("--new-tokens", 4096), "may grow by 4096"),
    ],
)
def test_wrong_use_is_refused(
    run: Run, folder: Path, data: Path, tmp_path: Path, args: tuple[object, ...], message: str
) -> None:
    before = (data / "a.jsonl").read_bytes()
    result = run("eval", folder, *(data / "a.jsonl" if arg == "A" else arg for arg in args))
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(said_in(result)) == 1 and message in result.stderr
    assert (data / "a.jsonl").read_bytes() == before


def test_the_widest_table_fits_80_columns(run: Run, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "yes.jsonl", [{"prompt": "a", "answer": "yes"}, {"prompt": "b", "answer": "no"}])
    result = run("eval", folder, "--data", path, "--metric", "yes-no", *FEW)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 - len("optimized") + len("dense")
    for words in ("precision", "recall", "F1", "says yes", "unclear", "100.0%"):
        assert words in result.stdout
