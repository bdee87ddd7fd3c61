"""Dynamic rotary scaling: below its length models are what transformers computes, and beyond it they are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foveate
from foveate.errors import InputError, UnsupportedModelError
from foveate.manifest import MANIFEST
from foveate.model import OptimizedModel
from foveate.models.registry import trace_program
from foveate.positions import check_positions, check_step
from tests.ir.programs import once
from tests.models import tiny
from tests.models.prompts import made

LIMIT = 80
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
STATIC = {"rope_type": "default", "rope_theta": 1000.0}


def text(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": {**DYNAMIC, **rope}, "max_position_embeddings": LIMIT}


MODELS: dict[str, Callable[[], Any]] = {
    "internvl": lambda: tiny.internvl("qwen2", **text()),
    "llava-next": lambda: tiny.llava_next("llama", text=text()),
    "qwen2-vl": lambda: tiny.qwen2_vl(text=text(mrope_section=[1, 1, 2])),
    "gemma3": lambda: tiny.gemma3(
        rope_parameters={"full_attention": DYNAMIC, "sliding_attention": STATIC}, max_position_embeddings=LIMIT
    ),
}
each = pytest.mark.parametrize("name", MODELS)


@once
def traced(name: str) -> tuple[Any, Any]:
    """A model and its program; nobody may change them, so transformers runs copies."""
    source = MODELS[name]()
    return source, foveate.trace(source)


def optimized(name: str, passes: str = "") -> OptimizedModel:
    source, program = traced(name)
    return foveate.optimize(source, passes, traced=program)


def theirs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers takes them, which wants to be told what the ids tell."""
    if "image_grid_thw" not in inputs:
        return inputs
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int()}


def longer(inputs: dict[str, Tensor], words: int) -> dict[str, Tensor]:
    """The same prompts with so many words behind each."""
    more = {"input_ids": 2 + torch.arange(words) % 40, "attention_mask": torch.ones(words, dtype=torch.int64)}
    more["token_type_ids"] = torch.zeros(words, dtype=torch.int64)
    rows = len(inputs["input_ids"])
    grown = {name: torch.cat([inputs[name], more[name].repeat(rows, 1)], 1) for name in more if name in inputs}
    return {**inputs, **grown}


def answered(model: Any, inputs: dict[str, Tensor], new_tokens: int, **options: Any) -> tuple[Tensor, bool]:
    """What transformers generates, and whether it changed frequencies on the way."""
    fresh = copy.deepcopy(model)
    found = fresh.generate(**theirs(model, inputs), max_new_tokens=new_tokens, do_sample=False, **options)
    state = vars(fresh.model.language_model.rotary_emb)
    return found, any(int(value) > LIMIT for name, value in state.items() if name.endswith("max_seq_len_cached"))


@once
def last(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The longest prompts at which transformers changes nothing, and those of one token more."""
    model = traced(name)[0]
    start = made(model, 3, [[1], [0]]).inputs
    words = LIMIT - start["input_ids"].shape[1]  # a token takes one position at most
    assert words > 8, "so that prompts with answers fit too"
    assert not answered(model, longer(start, words), 1)[1]
    while not answered(model, longer(start, words + 1), 1)[1]:
        words += 1
    return longer(start, words), longer(start, words + 1)


def shorter(name: str, words: int) -> dict[str, Tensor]:
    """The longest prompts without their last words."""
    cut = ("input_ids", "attention_mask", "token_type_ids")
    return {key: value[:, :-words] if key in cut else value for key, value in last(name)[0].items()}


@each
def test_up_to_the_last_position_logits_are_those_of_transformers(name: str) -> None:
    model, mine = traced(name)[0], optimized(name)
    inputs, beyond = last(name)
    with torch.no_grad():
        expected = copy.deepcopy(model)(**theirs(model, inputs)).logits[:, -1:]
        torch.testing.assert_close(mine(**inputs).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match=rf"takes {LIMIT + 1} positions; this model has {LIMIT} \(max_position"):
        mine(**beyond)


@each
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_answers_up_to_the_last_position_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    """The last token of an answer is not run, so it takes no position."""
    model, mine = traced(name)[0], optimized(name)
    inputs = shorter(name, 6)
    expected, changed = answered(model, inputs, 7, **options)
    assert not changed
    assert torch.equal(mine.generate(**inputs, max_new_tokens=7, do_sample=False, **options), expected)
    assert answered(model, inputs, 8, **options)[1]
    mine._run = {}  # nothing may run
    with pytest.raises(InputError, match=rf"8 new tokens would make it {LIMIT + 1}; .*max_new_tokens of at most 7;"):
        mine.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


@each
@pytest.mark.parametrize("passes", ["", "fastv{layer=1,keep=0.5}", "heavy-recent"])
def test_decoding_step_by_step_ends_at_the_last_position(name: str, passes: str) -> None:
    if (name, passes) == ("gemma3", "heavy-recent"):
        pytest.skip("its layers have windows, which heavy-recent refuses")
    mine = optimized(name, passes)
    with torch.no_grad():
        out = mine(**shorter(name, 3))
        token = torch.full((2, 1), 5)
        for _ in range(2):
            out = mine(input_ids=token, cache=out.cache)
        seen = out.cache.seen
        with pytest.raises(
            InputError, match=rf"taken {LIMIT - 1} positions, and 2 more tokens would .* at most 1 more"
        ):
            mine(input_ids=token.repeat(1, 2), cache=out.cache)
        assert out.cache.seen == seen
        mine(input_ids=token, cache=out.cache)
        with pytest.raises(InputError, match=rf"1 more token would make it {LIMIT + 1}; .* Decode at most 0 more"):
            mine(input_ids=token, cache=out.cache)


def test_what_was_generated_goes_on_up_to_the_last_position() -> None:
    mine, inputs = optimized("internvl"), shorter("internvl", 4)
    whole = mine.generate(**inputs, max_new_tokens=5, do_sample=False)
    first = mine.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    rest = {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)}
    again = {**rest, "cache": first.cache if hasattr(first, "cache") else first.past_key_values}
    assert torch.equal(mine.generate(first.sequences, **again, max_length=whole.shape[1], do_sample=False), whole)
    first = mine.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    again = {**rest, "cache": first.cache if hasattr(first, "cache") else first.past_key_values}
    with pytest.raises(InputError, match=f"would make it {LIMIT + 1}"):
        mine.generate(first.sequences, **again, max_length=whole.shape[1] + 1, do_sample=False)


def test_padding_takes_no_position_and_own_positions_count() -> None:
    mine, inputs = optimized("internvl"), last("internvl")[0]
    padded = {name: torch.nn.functional.pad(inputs[name], (3, 0)) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = mine(**inputs).logits
        torch.testing.assert_close(mine(**{**inputs, **padded}).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=f"takes {LIMIT + 1} positions"):
        mine(**inputs, position_ids=torch.arange(1, inputs["input_ids"].shape[1] + 1)[None])


def test_positions_that_close_over_what_the_tower_lets_go_are_not_taken() -> None:
    """Those of tokens that go in the decoder are: their neighbours keep theirs."""
    _, beyond = last("internvl")
    gone = int((beyond["input_ids"][0] == tiny.VOCAB - 1).sum()) // 2
    assert gone
    for passes in ("", "fastv{layer=1,keep=0.5}"):
        with pytest.raises(InputError, match="dropping more there does not help"):
            optimized("internvl", passes)(**beyond)
    mine = optimized("internvl", "divprune{keep=0.5}")
    fits = longer(last("internvl")[0], gone)
    with torch.no_grad():
        assert int(mine(**fits).cache.next_position.max()) == LIMIT
        mine._run = {"vision": mine._run["vision"]}  # the decoder may not run
        with pytest.raises(InputError, match=f"takes {LIMIT + 1} positions"):
            mine(**longer(last("internvl")[0], gone + 1))
        with pytest.raises(InputError, match=f"2 new tokens would make it {LIMIT + 1}"):
            mine.generate(**fits, max_new_tokens=2)


def test_longer_prompts_are_not_trained_on() -> None:
    mine = optimized("internvl")
    inputs, beyond = last("internvl")
    assert mine(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    with pytest.raises(InputError, match=f"takes {LIMIT + 1} positions"):
        mine(**beyond, labels=beyond["input_ids"])


# --- tracing --------------------------------------------------------------------------------------------


def test_a_model_is_traced_as_with_the_default_embedding() -> None:
    source, program = traced("internvl")
    plain = trace_program(tiny.internvl("qwen2", max_position_embeddings=LIMIT))
    assert program.to_text() == plain.to_text()
    assert (program.info.position_limit, plain.info.position_limit) == (LIMIT, None)
    name = "model.language_model.rotary_emb.inv_freq"
    assert torch.equal(program.weights.get(name), plain.weights.get(name))
    assert source.model.language_model.rotary_emb.rope_type == "dynamic"


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 10.1])
@pytest.mark.parametrize("length", [48, 100, 6007, 32768])
def test_below_its_length_transformers_has_the_default_frequencies(factor: float, length: int) -> None:
    changes = {"factor": factor, "rope_theta": 1e6}
    dynamic = tiny.internvl("qwen2", "cpu", rope_parameters={**DYNAMIC, **changes}, max_position_embeddings=length)
    plain = tiny.internvl("qwen2", "cpu", rope_theta=1e6, max_position_embeddings=length)
    mine, other = (model.model.language_model.rotary_emb for model in (dynamic, plain))
    assert torch.equal(mine.inv_freq, other.inv_freq) and torch.equal(mine.original_inv_freq, other.inv_freq)
    assert mine.attention_scaling == other.attention_scaling == 1
    assert mine.max_seq_len_cached == mine.original_max_seq_len == length


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_a_model_that_saw_a_longer_prompt_is_traced_as_a_fresh_one_and_left_as_it_was(name: str) -> None:
    source, program = copy.deepcopy(traced(name)[0]), traced(name)[1]
    with torch.no_grad():
        source(**theirs(source, last(name)[1]))
    rotary = source.model.language_model.rotary_emb
    kind = "full_attention_" if name == "gemma3" else ""
    grown = rotary.get_buffer(f"{kind}inv_freq")
    assert not torch.equal(grown, rotary.get_buffer(f"{kind}original_inv_freq"))
    before = (copy.copy(vars(rotary)), dict(rotary.named_buffers()), source.state_dict().keys())
    again = trace_program(source)
    assert vars(rotary).keys() == before[0].keys() and rotary.rope_type == before[0]["rope_type"]
    assert {key: id(value) for key, value in rotary.named_buffers()} == {k: id(v) for k, v in before[1].items()}
    assert source.state_dict().keys() == before[2]
    assert again.to_text() == program.to_text()
    inputs = last(name)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            foveate.optimize(source, "", traced=again)(**inputs).logits, optimized(name)(**inputs).logits
        )


def longrope(source: Any, kind: str | None = None) -> Any:
    given = source.config.text_config.rope_parameters
    (given if kind is None else given[kind])["rope_type"] = "longrope"
    return source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: longrope(tiny.internvl("qwen2", "meta")),
            "embedding 'longrope' depends on the prompt's length; suppor",
        ),
        (lambda: longrope(tiny.gemma3("meta"), "full_attention"), r"'longrope' \(full_attention\) depends on the pro"),
    ],
)
def test_other_embeddings_that_depend_on_the_length_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message + ".*: default, dynamic, linear, llama3, yarn"):
        trace_program(make())


# --- files ----------------------------------------------------------------------------------------------


def test_a_saved_model_keeps_its_limit(tmp_path: Path) -> None:
    inputs, beyond = last("internvl")
    optimized("internvl").save_pretrained(tmp_path / "saved")
    back = foveate.load(tmp_path / "saved")
    assert back.program.info == traced("internvl")[1].info
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, optimized("internvl")(**inputs).logits)
    with pytest.raises(InputError, match=f"this model has {LIMIT} "):
        back(**beyond)


def arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.numpy() for name, value in inputs.items()}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic") / "out"
    foveate.export(optimized("internvl"), output=folder)
    return folder


def test_an_exported_package_ends_where_the_model_ends(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, here = traced("internvl")[0], foveate.load(package, tensors="np")
    inputs, beyond = last("internvl")
    with torch.no_grad():
        expected = copy.deepcopy(model)(**inputs).logits[:, -1:]
    np.testing.assert_allclose(here(**arrays(inputs)).logits, expected.numpy(), rtol=0, atol=1e-4)
    begun = arrays(shorter("internvl", 6))
    answer = answered(model, shorter("internvl", 6), 7)[0]
    assert np.array_equal(here.generate(**begun, max_new_tokens=7), answer.numpy())
    first = here(**begun)
    assert len(list(here.tokens(first, max_new_tokens=7))) == 7
    with pytest.raises(InputError, match=f"taken {LIMIT} positions, and 1 more token would make it {LIMIT + 1}"):
        here([[5], [5]], cache=first.cache)
    first = here(**begun)
    here.graphs = {"vision": here.graphs["vision"]}  # nothing may run
    monkeypatch.setattr(here.graphs["vision"], "run", None)
    with pytest.raises(InputError, match=f"takes {LIMIT + 1} positions"):
        here(**arrays(beyond))
    with pytest.raises(InputError, match=rf"8 new tokens would make it {LIMIT + 1}; .*max_new_tokens of at most 7"):
        here.generate(**begun, max_new_tokens=8)
    with pytest.raises(InputError, match=f"taken {LIMIT - 6} positions, and 7 more tokens would make it {LIMIT + 1}"):
        here.tokens(first, max_new_tokens=8)


def test_a_package_closes_positions_over_what_the_tower_lets_go(tmp_path: Path) -> None:
    foveate.export(optimized("internvl", "divprune{keep=0.5}"), output=tmp_path / "out", verify=False)
    here = foveate.load(tmp_path / "out", tensors="np")
    inputs = last("internvl")[0]
    gone = int((inputs["input_ids"][0] == tiny.VOCAB - 1).sum()) // 2
    fits = arrays(longer(inputs, gone))
    assert here(**fits).cache.taken() == LIMIT
    with pytest.raises(InputError, match=f"takes {LIMIT + 1} positions"):
        here(**arrays(longer(inputs, gone + 1)))
    with pytest.raises(InputError, match=f"2 new tokens would make it {LIMIT + 1}"):
        here.generate(**fits, max_new_tokens=2)


def test_manifests_that_say_nothing_of_a_limit_have_none(package: Path) -> None:
    path = package / MANIFEST
    before = path.read_text(encoding="utf-8")
    content = json.loads(before)
    assert content["prompts"].pop("position_limit") == LIMIT
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        older = foveate.load(package, tensors="np")
        assert older.about.position_limit is None
        older(**arrays(last("internvl")[1]))
        # Over torch the configuration says it.
        with pytest.raises(InputError, match=f"this model has {LIMIT} "):
            foveate.load(package)(**last("internvl")[1])
    finally:
        path.write_text(before, encoding="utf-8")


# --- what is said ---------------------------------------------------------------------------------------


def test_the_prompt_that_is_too_long_is_named() -> None:
    check_positions(None, [10**9], 10**9)
    check_positions(8, [5, 8])
    check_positions(8, [5, 6], 3)
    with pytest.raises(
        InputError, match=r"the prompt in row 1 of input_ids takes 9 positions; this model has 8 \(max_p"
    ):
        check_positions(8, [5, 9, 3])
    with pytest.raises(
        InputError, match=r"row 1 .* takes 6 positions, and 4 new tokens would make it 9; .* at most 3;"
    ):
        check_positions(8, [5, 6], 4)
    check_step(None, 10**9, 1)
    check_step(8, 7, 1)
    with pytest.raises(InputError, match=r"taken 7 positions, and 2 more tokens would make it 9; .* at most 1 more"):
        check_step(8, 7, 2)
