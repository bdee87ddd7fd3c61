"""Calibration: the numbers, going on after an interruption, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from foveate import calibrate as module
from foveate.calibrate import calibrate, unfinished
from foveate.errors import ArtifactError, InputError, PassError
from foveate.examples import Example
from foveate.ir.statistics import KEY, Statistics
from foveate.models.digits import samples
from tests.ir.programs import traced
from tests.ir.test_observe import brute_force
from tests.small_digits import small_digits

TENSORS = ("mass", "output", "text_to_visual", "by_distance", "pairs", "neurons", "cut_kl")


def examples() -> list[Example]:
    """Questions of unequal length; the second one has two images."""
    found = [Example(s.prompt, [s.image], place=f"sample {i}") for i, s in enumerate(samples(n=5, seed=1))]
    two = samples(n=2, seed=2)
    found[1] = Example(f"<image> {two[0].prompt}", [two[0].image, two[1].image], place="sample 1")
    return found


@pytest.fixture(scope="module")
def counted() -> Statistics:
    return calibrate(*small_digits(), examples(), batch=2)


def same(a: Statistics, b: Statistics) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


@pytest.mark.slow
def test_statistics_are_those_of_eager_attention(counted: Statistics) -> None:
    model, processor = small_digits()
    expected = []
    for example in examples():
        images = [image() if callable(image) else image for image in example.images]
        inputs = dict(processor(text=[example.prompt], images=images, return_tensors="pt"))
        ids = inputs["input_ids"][0]
        first = (ids == model.config.image_token_id).nonzero()[0]
        later = int((ids[first:] != model.config.image_token_id).sum())
        expected.append((brute_force(model, inputs), later))

    def near(actual: torch.Tensor, wanted: list[torch.Tensor], total: bool = True) -> None:
        both = torch.stack(wanted)
        torch.testing.assert_close(actual.float(), both.sum(0) if total else both, rtol=2e-5, atol=1e-5)

    for layer in range(2):
        rows = [(found[layer], later) for found, later in expected]
        mass = [row["mass"][0].sum(1) for row, _ in rows]
        near(counted.mass[:, layer], [m[:, 1] / (m[:, 0] + m[:, 2]) for m in mass], total=False)
        norms = [row["norms"][0] for row, _ in rows]
        near(counted.output[:, layer], [n[:, 0] / n[:, 1] for n in norms], total=False)
        near(counted.text_to_visual[layer], [row["mass"][0, :, 1, 1] / later for row, later in rows])
        near(counted.by_distance[layer], [row["by_distance"][0] for row, _ in rows])
        near(counted.neurons[layer], [row["neurons"][0] for row, _ in rows])
        near(counted.cut_kl[layer], [row["cut_kl"][0] for row, _ in rows])
        near(counted.pairs, [row["pairs"][0] for row, _ in rows])
    assert (counted.text_to_visual / counted.samples < 1).all()


def test_the_batch_size_changes_nothing(counted: Statistics) -> None:
    alone = calibrate(*small_digits(), examples(), batch=1)
    for name in TENSORS:
        torch.testing.assert_close(getattr(alone, name), getattr(counted, name), rtol=2e-5, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_calibration_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    model, processor = small_digits()
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    calibrate(model, processor, examples(), batch=2, output=whole, name="m")

    def stop(label: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, examples(), batch=2, output=broken, name="m", tick=stop)
    assert not broken.exists()
    assert Statistics.load(unfinished(broken)).samples == 4
    started: list[int] = []
    resumed = calibrate(
        model,
        processor,
        examples(),
        batch=2,
        output=broken,
        name="m",
        resume=True,
        tick=lambda label, done, total: started.append(done),
    )
    assert started == [4, 5]
    assert broken.read_bytes() == whole.read_bytes()
    assert same(Statistics.load(whole), resumed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.safetensors", "whole.safetensors"]


@pytest.mark.slow
def test_what_tokens_receive_is_counted_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Statistics
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    path = tmp_path / "x.safetensors"

    def stop(label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole = calibrate(*small_digits(), examples(), batch=2, tokens=True)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*small_digits(), examples(), batch=2, output=path, tokens=True, tick=stop)
    with pytest.raises(InputError, match="begun with --tokens"):
        calibrate(*small_digits(), examples(), batch=2, output=path, resume=True)
    resumed = calibrate(*small_digits(), examples(), batch=2, output=path, resume=True, tokens=True)
    assert counted.visual is None and same(whole, counted)
    for found in (resumed, Statistics.load(path)):
        assert same(found, whole)
        assert all(torch.equal(getattr(found, name), getattr(whole, name)) for name in ("visual", "cross", "own"))


def test_an_unfinished_file_is_not_overwritten_nor_mixed_with_another_run(tmp_path: Path, counted: Statistics) -> None:
    path = tmp_path / "x.safetensors"

    def again(message: str, resume: bool = True, **changes: Any) -> None:
        options: dict[str, Any] = {"batch": 2, "name": "", "examples": examples(), **changes}
        with pytest.raises(InputError, match=message):
            model, processor = small_digits(options.pop("layers", 2))
            calibrate(model, processor, options.pop("examples"), output=path, resume=resume, **options)

    part = calibrate(*small_digits(), examples()[:2], batch=2, output=path)
    path.rename(unfinished(path))
    assert part.samples == 2
    again("interrupted: go on with --resume, or remove it", resume=False)
    again("batch 2, not 3", batch=3)
    again("model , not other", name="other")
    again("another shape", layers=1)
    again("begun without --tokens", tokens=True)
    again("other samples", examples=examples()[1:])
    again("other samples", examples=examples()[:1])


@pytest.mark.slow
def test_examples_that_do_not_fit_are_named() -> None:
    model, processor = small_digits()
    good = examples()[0]
    for bad, message in (
        (Example("no image here", [], place="line 7"), "line 7: the prompt has no image"),
        (Example(good.prompt + " a" * 5000, good.images, place="line 7"), r"line 7: the prompt is \d+ tokens long"),
        (Example(good.prompt, [*good.images, *good.images], place="line 7"), "image"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(model, processor, [bad], batch=1)
    with pytest.raises(InputError, match="line 7: the prompt has no image"):
        calibrate(model, processor, [good, Example("no image here", [], place="line 7")], batch=2)


def test_values_that_are_not_finite_are_refused(counted: Statistics) -> None:
    layers, heads = counted.mass.shape[1:]
    sizes = ((1, heads, 2, 3), (1, heads, 2), (1, heads, 3), (1, 3), (1, 5), (1,))
    values = [[torch.ones(size) for size in sizes] for _ in range(layers)]
    values[1][4][0, 2] = float("inf")
    with pytest.raises(InputError, match="sample 6: neurons of layer 1 is not finite"):
        counted.extended(values, torch.ones(1), torch.ones(1))


def test_votes_are_strict_in_both_numbers() -> None:
    model = {"family": "x", "layers": 1, "heads": 3}
    mass = torch.tensor([[0.2, 0.2, 0.1], [0.2, 0.2, 0.1], [0.2, 0.0, 0.1], [0.0, 0.0, 0.1], [0.0, 0.0, 0.1]])
    empty = torch.zeros(0)
    found = Statistics(model, mass[:, None], mass[:, None], empty, empty, empty, empty, empty)
    assert found.active(0.1, 0.4).tolist() == [[True, False, False]]  # 3 of 5; 2 of 5 is not more than 40%
    assert found.active(0.0, 0.4).tolist() == [[True, False, True]]


def test_statistics_of_another_model_are_refused(counted: Statistics) -> None:
    with pytest.raises(PassError, match=r"who: the statistics are of a model with layers=2, this one has layers=3"):
        counted.check(traced()[1].info, "who")


def test_a_saved_file_reads_back(tmp_path: Path, counted: Statistics) -> None:
    counted.save(tmp_path / "a.safetensors")
    again = Statistics.load(tmp_path / "a.safetensors")
    assert same(again, counted)
    assert (again.model, again.source, again.samples) == (counted.model, counted.source, 5)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path, counted: Statistics) -> None:
    path = tmp_path / "a.safetensors"
    counted.save(path)
    whole = path.read_bytes()
    tensors = {name: getattr(counted, name).clone() for name in TENSORS}
    about = {"format": 1, "samples": 5, "model": counted.model, "source": {}}

    def refused(message: str) -> None:
        with pytest.raises(ArtifactError, match=message) as caught:
            Statistics.load(path)
        assert "\n" not in str(caught.value)

    def written(about: Any, **changes: Any) -> None:
        found = {**tensors, **changes}
        save_file({n: t for n, t in found.items() if t is not None}, path, {KEY: json.dumps(about)})

    path.write_bytes(whole[:-9])
    refused("cannot be read")
    path.write_bytes(b"no tensors at all")
    refused("cannot be read")
    path.unlink()
    refused("there is no such file")
    save_file({"x": torch.zeros(1)}, path)
    refused("holds no statistics; make them with `foveate calibrate`")
    written({**about, "format": 2})
    refused("have format 2; this foveate reads 1")
    written({**about, "samples": 6})
    refused("mass is torch.float32")
    written({**about, "model": {"layers": 2}})
    refused("bad metadata")
    written(about, neurons=None)
    refused("neurons is missing")
    written(about, mass=tensors["mass"].double())
    refused("mass is torch.float64")
    written(about, pairs=tensors["pairs"] * float("nan"))
    refused("pairs holds values that are not finite")
    apart = {"visual": torch.tensor([2, 1, 1, 1, 1]), "cross": torch.zeros(6, 2), "own": torch.zeros(6, 2)}
    written(about, **apart)
    assert Statistics.load(path).cross.shape == (6, 2)
    written(about, **{**apart, "own": None})
    refused("own is missing, not \\[6, 2\\]")
    written(about, **{**apart, "visual": torch.tensor([2, 1, 1, 1, 2])})
    refused("cross is torch.float32")
    written(about, **{**apart, "visual": torch.tensor([3, 2, 2, -2, 1])})
    refused("visual holds values that are below 1")
