"""The file of replies: what is written, what is taken up again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from foveate.answers import Answers, digest
from foveate.errors import ArtifactError, InputError
from foveate.examples import Example, Question

ABOUT = {"model": "m", "passes": ["fastv"], "new_tokens": 4, "questions": "0"}
ONE, TWO = (Question(Example("prompt"), ("yes",), id=name) for name in ("1", "zwei"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "said.jsonl"
    answers = Answers(ABOUT, found)
    answers.add(None, [ONE, TWO], ["a\nb", "\u2028 ü"])
    answers.add("fastv", [ONE], [""])
    return found


def test_what_was_said_is_read_again(path: Path) -> None:
    again = Answers(ABOUT, path, resume=True)
    assert [again.get(None, ONE), again.get(None, TWO)] == ["a\nb", "\u2028 ü"]
    assert [again.get("fastv", ONE), again.get("fastv", TWO)] == ["", None]
    head, *rows = (json.loads(line) for line in path.read_bytes().splitlines())
    assert head == {"foveate": "eval", **ABOUT}
    assert rows[0] == {"passes": None, "id": "1", "said": "a\nb"}


def test_every_length_it_can_be_cut_to_goes_on(path: Path) -> None:
    """A run may end within any byte; what is whole before it is kept, and the file becomes the same."""
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        answers = Answers(ABOUT, path, resume=True)
        kept = sum(answers.get(passes, q) is not None for passes in (None, "fastv") for q in (ONE, TWO))
        assert kept == max(0, whole[:length].count(b"\n") - 1)
        for passes, question, said in ((None, ONE, "a\nb"), (None, TWO, "\u2028 ü"), ("fastv", ONE, "")):
            if answers.get(passes, question) is None:
                answers.add(passes, [question], [said])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "n"}, "was begun with model 'm', not 'n'"),
        ({"passes": []}, "was begun with passes ['fastv'], not []"),
        ({"new_tokens": 5}, "was begun with new tokens 4, not 5"),
        ({"questions": "1"}, "was begun with other questions"),
    ],
)
def test_another_run_is_refused(path: Path, changed: dict[str, object], message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError) as refused:
        Answers({**ABOUT, **changed}, path, resume=True)
    assert message in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b'{"image": "a.png"}\n', b"nonsense", b"\xff\xfe\n", b"[]\n", b"\n"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no file of answers"):
        Answers(ABOUT, path, resume=True)
    with pytest.raises(InputError, match="exists already"):
        Answers(ABOUT, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"{}", b'{"passes": 1, "id": "1"}', b'{"passes": [], "id": "1", "said": "x"}', b"\xff"]
)
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ArtifactError, match=r"said.jsonl, line 3: no answer"):
        Answers(ABOUT, path, resume=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        Answers(ABOUT, tmp_path / "gone" / "x.jsonl")


def test_the_digest_tells_what_is_asked_and_not_what_is_right(tmp_path: Path) -> None:
    def of(prompt: str = "p", name: str = "1", colour: str = "red", answer: str = "yes") -> str:
        image = Image.new("RGB", (2, 2), colour)
        return digest([Question(Example(prompt, (image,)), (answer,), id=name)])

    assert of(answer="no") == of()
    assert len({of(), of(prompt="q"), of(name="2"), of(colour="blue")}) == 4
    file = tmp_path / "a.png"
    found = set()
    for side in (2, 40):
        Image.effect_noise((side, side), 9).save(file)
        found.add(digest([Question(Example("p", (file,)), ("yes",))]))
    assert len(found) == 2
