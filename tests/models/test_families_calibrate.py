"""Every family is calibrated: what its neurons do is what transformers' own modules do."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import calibrate as module
from foveate.calibrate import calibrate
from foveate.errors import TraceError
from foveate.examples import Example
from tests.models.prompts import Made, made
from tests.models.test_running import MODELS, source, traced
from tests.oracle.masked import masked_forward

ROWS = ([[1]], [[2]], [[1]])
"""Images of each prompt; each stands in a batch of its own."""


def neurons(name: str, batches: list[Made]) -> torch.Tensor:
    """Mean |activation| of each layer's neurons at visual tokens, added over prompts; zero in layers of experts."""
    model, seen = source(name), {}
    layers = model.get_submodule(traced(name).info.paths["layers"])
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
        if hasattr(layer.mlp, "down_proj")
    ]
    total = torch.zeros(len(layers), model.config.text_config.intermediate_size, dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            masked_forward(model, batch.inputs)
        patches = batch.coords[..., 0] >= 0  # newlines and words between tiles are none
        for i, activations in seen.items():
            total[i] += activations[patches].abs().double().mean(0)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_neurons_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [made(source(name), seed, rows) for seed, rows in enumerate(ROWS)]
    waiting = iter(batches)
    monkeypatch.setattr(module, "batch_inputs", lambda *given: next(waiting).inputs)
    examples = [Example("what?", []) for _ in batches]
    if name == "gemma3":
        with pytest.raises(TraceError, match="layer 0 cannot be observed: a token does not see just all tokens before"):
            calibrate(source(name), None, examples, batch=1)
        return
    found = calibrate(source(name), None, examples, batch=1)
    torch.testing.assert_close(found.neurons, neurons(name, batches), rtol=1e-4, atol=1e-4)
    assert found.samples == len(batches) and bool((found.text_to_visual > 0).all())
    assert foveate.optimize(source(name), "drop-visual-heads{keep=2,from_layer=0}", found).program.passes
