"""Trained selections: equal to the masked oracle with plain torch modules; their files; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import ArtifactError, FoveateError, PassError
from foveate.ir.cost import cost_of
from foveate.ir.cost.shapes import layer_shapes
from foveate.ir.cost.sizes import Sizes
from foveate.ir.modules import KEY, Modules
from foveate.models.random import random_inputs, random_llava
from foveate.passes import CutVisual, DropVisualHeads, DynamicViT, FastV, LVPruning, SmartTrim
from tests.oracle.learned import LVModule, TrimModule, ViTModule, learned, with_weights
from tests.oracle.masks import Masks, Prune
from tests.passes.check import check_pass, optimize, traced
from tests.passes.test_select import FEW
from tests.shipped import with_passes

HIDDEN = 64
ORACLES: dict[str, Any] = {"lvpruning": LVModule, "dynamicvit": ViTModule, "smarttrim": TrimModule}


def modules_of(selection: Any, model: Any, path: Path, seed: int = 0) -> Modules:
    """Modules with random weights, saved in `path`; norms and biases are drawn too."""
    program = traced(model)
    made = selection.new(program, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for value in made.tensors.values():
        if value.dim() == 1:
            value += 0.3 * torch.randn(value.shape, generator=generator)
    made.save(path)
    return made


def masks_of(name: str, modules: Modules, keeps: tuple[float, ...], of: int) -> Masks:
    prunes = []
    for layer, keep in zip(modules.before, keeps, strict=True):
        module = with_weights(ORACLES[name](HIDDEN), modules.tensors, layer).eval()
        prunes.append(Prune(layer, keep, "by", by=learned(module, keep, of)))
    return Masks(prunes=tuple(prunes))


CASES: list[tuple[Any, tuple[float, ...]]] = [
    (LVPruning(layers=(1, 2, 3), ratio=0.7, step=0.3), (0.7, 0.4, 0.1)),
    (LVPruning(layers=(2,), ratio=0.3), (0.3,)),
    (DynamicViT(keep=0.6), (0.6, 0.36, 0.216)),
    (SmartTrim(keep=0.25), (0.75, 0.5, 0.25)),
]


def named(selection: Any, path: Path) -> Any:
    from dataclasses import replace

    return replace(selection, modules=str(path))


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "keeps"), CASES, ids=lambda c: c.text() if hasattr(c, "text") else "")
def test_what_is_kept_is_what_the_modules_say(model: Any, selection: Any, keeps: Any, tmp_path: Path) -> None:
    made = modules_of(selection, model, tmp_path / "m.safetensors")
    masks = masks_of(selection.name, made, keeps, made.before[0])
    check_pass(model, [named(selection, tmp_path / "m.safetensors")], masks, FEW)


@pytest.mark.slow
def test_with_other_passes_before_and_behind(gqa: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    selection = LVPruning(layers=(2, 3), ratio=0.6, step=0.4, modules=str(path))
    made = modules_of(LVPruning(layers=(2, 3)), gqa, path)
    heads = torch.ones(4, 4, dtype=torch.bool)
    heads[2:, 1:3] = False
    prunes = (Prune(1, 0.7, "fastv"), *masks_of("lvpruning", made, (0.6, 0.2), 2).prunes)
    check_pass(gqa, [FastV(1, 0.7), selection, DropVisualHeads(mask=heads)], Masks(heads=heads, prunes=prunes), FEW[:2])
    cut = Masks(cut_from=3, prunes=masks_of("lvpruning", modules_of(LVPruning((2,)), gqa, path), (0.5,), 2).prunes)
    check_pass(gqa, [CutVisual(3), LVPruning((2,), str(path))], cut, FEW[1:2])


@pytest.mark.slow
def test_bf16_runs_and_modules_take_the_models_type(tmp_path: Path) -> None:
    half = random_llava(layers=2, dtype=torch.bfloat16)
    selection = LVPruning(layers=(1,), modules=str(tmp_path / "m"))
    modules_of(LVPruning(layers=(1,)), random_llava(layers=2), tmp_path / "m")
    opt = foveate.optimize(half, [selection])
    assert opt.weights.get("lvpruning.1.head.weight").dtype == torch.bfloat16
    with torch.inference_mode():
        assert opt(**random_inputs(half)).kept[1].shape == (1, 8)


@pytest.mark.slow
def test_ratios_change_without_training_and_every_share_rounds_as_written(gqa: Any, tmp_path: Path) -> None:
    made = modules_of(LVPruning(layers=(1, 2, 3)), gqa, tmp_path / "m")
    assert LVPruning(ratio=0.6).shares(3) == (0.6, 0.4, 0.2)
    for ratio, step, keeps in ((0.5, 0.125, (0.5, 0.375, 0.25)), (1.0, 0.25, (1.0, 0.75, 0.5))):
        selection = LVPruning(layers=(1, 2, 3), ratio=ratio, step=step, modules=str(tmp_path / "m"))
        check_pass(gqa, [selection], masks_of("lvpruning", made, keeps, 1), FEW[1:2])


@pytest.mark.slow
def test_saved_with_the_model_and_without_it_the_model_is_as_it_was(gqa: Any, tmp_path: Path) -> None:
    modules_of(LVPruning(layers=(1, 3)), gqa, tmp_path / "m")
    opt = optimize(gqa, [LVPruning(layers=(1, 3), modules=str(tmp_path / "m"))])
    opt.save_pretrained(tmp_path / "saved")
    (tmp_path / "m").unlink()
    inputs = random_inputs(gqa, seed=4)
    with torch.inference_mode():
        again = foveate.load(tmp_path / "saved")(**inputs)
        found = opt(**inputs)
        assert torch.equal(again.logits, found.logits) and torch.equal(again.kept[3], found.kept[3])
        torch.testing.assert_close(
            optimize(gqa, None)(**inputs).logits[:, 0], gqa(**inputs).logits[:, -1], rtol=0, atol=1e-4
        )
    assert not any("lvpruning" in name for name in dict(gqa.named_parameters()))


PADDED = 64
"""Rows that the Hugging Face checkpoint's vocabulary has beyond the 32000 that the paper counts."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "counts", "published"),
    [(0.6, (345, 230, 115), 3.9755), (0.5, (288, 172, 57), 3.1891), (0.45, (259, 144, 28), 2.7979)],
)
def test_the_figures_of_lvpruning_from_the_graph(ratio: float, counts: tuple[int, ...], published: float) -> None:
    program = with_passes("llava-1.5-7b", f"lvpruning{{ratio={ratio}}}")
    sizes = Sizes(program, {"visual_tokens": 576, "text_tokens": 30, "batch": 1})
    assert [shape.tokens for shape in layer_shapes(program, sizes)] == [
        *(576, *[counts[0]] * 7, *[counts[1]] * 8, *[counts[2]] * 16)
    ]
    spent = cost_of(program, convention="lvpruning", text_tokens=30).first_token_flops
    spent -= 2 * (30 + counts[2]) * 4096 * PADDED
    assert round(spent / 1e12, 4) == published
    with pytest.raises(FoveateError, match="leave the option out"):
        cost_of(program, convention="lvpruning", modules=(1, 8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("selection", [LVPruning((1, 3)), DynamicViT((1, 3)), SmartTrim((1, 3))], ids=lambda s: s.name)
def test_the_forecast_counts_what_runs(gqa: Any, selection: Any, tmp_path: Path) -> None:
    modules_of(selection, gqa, tmp_path / "m")
    opt = optimize(gqa, [named(selection, tmp_path / "m")])
    inputs, _ = opt.prefill_inputs(**random_inputs(gqa, text_tokens=12, prefix=3))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        opt._run["prefill"](inputs)
    forecast = cost_of(opt.program, visual_tokens=16, text_tokens=12, prefix_tokens=3)
    assert counter.get_total_flops() == forecast.prefill.flops


def rewritten(path: Path, change: Any, tensors: Any = None) -> Path:
    """A copy of a file whose metadata, or tensors, were tampered with."""
    made = Modules.load(path)
    about = {"format": 1, "kind": made.kind, "model": dict(made.model), "before": list(made.before), "trained": {}}
    values = {**made.tensors, **(tensors or {})}
    change(about)
    target = path.with_name("changed")
    target.write_bytes(
        safetensors.torch.save({k: v for k, v in values.items() if v is not None}, {KEY: json.dumps(about)})
    )
    return target


HEAD = "1.head.weight"
DAMAGED: dict[str, tuple[Any, Any, str]] = {
    "format": (lambda a: a.update(format=7), None, "have format 7"),
    "no metadata": (lambda a: a.clear(), None, "have format None"),
    "no layers": (lambda a: a.pop("before"), None, "are damaged: bad metadata"),
    "layers that are none": (lambda a: a.update(before="x"), None, "are damaged: bad metadata"),
    "another kind": (lambda a: a.update(kind="fastv"), None, "holds modules of fastv"),
    "another model": (lambda a: a["model"].update(hidden_size=32), None, "with hidden_size=32, this one has"),
    "other layers": (lambda a: a.update(before=[2]), None, r"before layers \[2\], not \[1\]"),
    "a weight too few": (lambda a: None, {HEAD: None}, f"{HEAD} is missing"),
    "a weight too many": (lambda a: None, {"1.evil": torch.zeros(1)}, r"1.evil is \(1,\), not part of a module"),
    "another shape": (lambda a: None, {HEAD: torch.zeros(3, 64)}, r"is \(3, 64\), not \(2, 64\)"),
    "not finite": (lambda a: None, {HEAD: torch.full((2, 64), torch.nan)}, "no finite numbers"),
    "whole numbers": (lambda a: None, {HEAD: torch.zeros(2, 64, dtype=torch.int64)}, "no finite numbers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_one_line(gqa: Any, tmp_path: Path, case: str) -> None:
    change, tensors, message = DAMAGED[case]
    modules_of(LVPruning(layers=(1,)), gqa, tmp_path / "m")
    path = rewritten(tmp_path / "m", change, tensors)
    with pytest.raises(FoveateError, match=message) as error:
        optimize(gqa, [LVPruning(layers=(1,), modules=str(path))])
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_modules(gqa: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    modules_of(LVPruning(layers=(1,)), gqa, tmp_path / "short")
    (tmp_path / "short").write_bytes((tmp_path / "short").read_bytes()[:-9])
    for name, message in (
        ("gone", "there is no such file"),
        ("text", "cannot be read"),
        ("foreign", "holds no modules"),
        ("short", "cannot be read"),
        (".", "cannot be read"),
    ):
        with pytest.raises(ArtifactError, match=message) as error:
            optimize(gqa, [LVPruning(layers=(1,), modules=str(tmp_path / name))])
        assert "\n" not in str(error.value)


BAD = {
    "lvpruning": "layer 16 is not one of this model's 4: give layers of 0 to 3 (the paper's 1, 8, 16 are of 32)",
    "lvpruning{layers=[1,2,3]}": "needs modules=FILE: train them with `foveate train",
    "lvpruning{layers=[]}": "one layer or more",
    "lvpruning{layers=[2,1]}": "layer numbers that rise",
    "lvpruning{ratio=0.4}": "small enough that ratio - 2 step is above 0",
    "lvpruning{step=-0.1}": "0 or more",
    "lvpruning{ratio=0}": "above 0, at most 1",
    "lvpruning{modules=3}": "allowed: a file",
    "dynamicvit": "dynamicvit needs modules=FILE",
    "dynamicvit{keep=0}": "above 0, at most 1",
    "smarttrim{keep=2}": "above 0, at most 1",
    "smarttrim{layers=[4]}": "layer 4 is not one of this model's 4: give layers of 0 to 3",
}


@pytest.mark.parametrize("passes", BAD)
def test_bad_options_are_refused(mha: Any, passes: str) -> None:
    with pytest.raises(PassError) as error:
        optimize(mha, passes)
    assert BAD[passes] in str(error.value)


@pytest.mark.slow
def test_places_where_tokens_cannot_be_selected(gqa: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    modules_of(LVPruning(layers=(1, 2)), gqa, Path(path))
    selection = LVPruning(layers=(1, 2), modules=path)
    for passes, message in (
        ([CutVisual(2), selection], "cut at layer 2"),
        ([FastV(2, 0.5), selection], "already selected before layer 2"),
    ):
        with pytest.raises(PassError, match=message):
            optimize(gqa, passes)
    with pytest.raises(PassError, match="cannot be shared out to 8 heads"):
        foveate.optimize(random_llava(layers=2, hidden=12, heads=2), [LVPruning(layers=(1,), modules=path)])
    with pytest.raises(PassError, match="this model has one layer"):
        foveate.optimize(random_llava(layers=1), [SmartTrim(modules=path)])
    with pytest.warns(foveate.errors.FoveateWarning, match="every share is 1"):
        optimize(gqa, [LVPruning(layers=(1, 2), ratio=1.0, step=0, modules=path)])
