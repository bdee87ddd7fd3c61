"""An optimized model: a program and a backend behind the Hugging Face calling convention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from foveate.backends.base import TRAINS, WHOLE_BUFFERS, Runner, lower, lower_graph
from foveate.cache import VisualTextCache
from foveate.errors import InputError
from foveate.generation import Generates, NextToken
from foveate.ir.program import Program, outputs
from foveate.ir.train import derive_train
from foveate.ir.weights import linear_weights
from foveate.labels import Asked, asked_of
from foveate.models.registry import FAMILIES
from foveate.ops import PAD
from foveate.positions import check_step
from foveate.prompts import Prompts, embed, prepare
from foveate.ragged import run_in_groups
from foveate.steps import Capture, captured, cuda_graph
from foveate.streams import Streams

OWN = "weights."
"""What precedes a weight's Hugging Face name in `OptimizedModel.state_dict()`."""


class OptimizedModel(PreTrainedModel, Generates):  # type: ignore[misc]  # transformers is untyped
    """Runs a program as a transformers model: `opt(**inputs)`, `opt.generate(**inputs)`.

    Made by `foveate.optimize` and `foveate.load`. It trains as any torch module does: `opt(**inputs, labels=labels)`
    gives a loss, gradients flow through every pass, and `parameters()` are those that its graphs read. They are the
    original model's own, so training changes that too, except what a pass had to reorder, which is a copy.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        program: Program,
        config: Any,
        generation_config: Any = None,
        backend: str = "eager",
        lowered: Callable[[], dict[str, Runner]] | None = None,
    ) -> None:
        """lowered: what makes the runners, where they lie ready in a package and need not be lowered."""
        config = copy.deepcopy(config)
        # How transformers' own experts would run: here that is for the graphs to say.
        config._experts_implementation = "eager"
        super().__init__(config)
        self.generation_config = copy.deepcopy(generation_config) or GenerationConfig.from_model_config(config)
        self.weights = program.weights
        self.program = program
        self.backend = backend
        self.capture: Capture | None = None
        program.weights.as_linears(linear_weights(program))
        self._lowered = lowered
        self._lower()
        self.eval()

    def _lower(self) -> None:
        self._run = lower(self.program, self.backend) if self._lowered is None else self._lowered()
        self._train: dict[str, Runner] = {}
        self._holders = self.weights.holders()

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        """Moving to another device lowers the graphs again; another dtype is refused before anything changes."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype:
            raise InputError(
                f"this model's graphs were made for {self.dtype}; cast the original model to {probe.dtype} and "
                "optimize that"
            )
        super()._apply(fn, recurse)
        self._lower()
        return self

    def capture_steps(self, wanted: bool = True) -> OptimizedModel:
        """Run decode steps as CUDA graphs from now on (one token a row, no beam search); InputError without a GPU."""
        if wanted and self.device.type != "cuda":
            raise InputError(f"decode steps are captured on a CUDA device; this model is on {self.device}")
        if wanted and "scores" in outputs(self.program.graphs["decode"]):
            raise InputError("decode steps that evict keys cannot be captured: each one changes the cache in place")
        self.capture = cuda_graph if wanted else None
        return self

    def report(self) -> Any:
        """What each pass did and what it gained; prints as a table."""
        from foveate.report.passes import report

        return report(self.program)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: VisualTextCache | None = None,
        cache: VisualTextCache | None = None,
        use_cache: bool = True,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        questions: Tensor | None = None,
        until: int = 0,
        **options: Any,
    ) -> NextToken:
        """Next-token logits of a batch of prompts, or of their continuation when a filled cache is given.

        Takes what the model's processor returns. With labels, int64 [B, S] as transformers takes them, the loss: the
        mean over labels, or their sum over `num_items_in_batch`. Selections such as FastV's then heed the last token
        before each row's first label, as they would for that prompt alone. questions: fp32 [images, P] of
        `foveate.questions`, where a pass asks for them. until: tokens of prompt and answer that will be run in all, as
        `generate` gives it to models with an end of positions. Raises InputError where the inputs do not fit together,
        or would go beyond that end.
        """
        named = {"pixel_values": pixel_values, "questions": questions, **_asked_for(options)}
        prompts = Prompts.of(
            self.program,
            {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **named},
        )
        if any(holder.replaced for holder in self._holders):
            self._lower()  # adapters came or went
        if labels is not None and self.backend not in TRAINS:
            raise InputError(f"the {self.backend} backend does not train; optimize or load the model with another one")
        if labels is not None:
            return self._run_train(prompts, labels, num_items_in_batch)
        cache = past_key_values if cache is None else cache
        if cache is not None and cache.get_seq_length():
            if not isinstance(cache, VisualTextCache):
                raise InputError(f"the cache is a {type(cache).__name__}; give one that this model returned")
            self._check_step(prompts.input_ids, cache, until)
            return self._run_decode(prompts.input_ids, cache)
        prepared = prepare(self.program, self._run, prompts, until=until)
        return self._run_prefill(prompts.input_ids, prepared.inputs, prepared.streams, cache, use_cache)

    def _run_prefill(
        self,
        input_ids: Tensor,
        inputs: dict[str, Tensor | int],
        streams: Streams,
        cache: VisualTextCache | None,
        use_cache: bool,
    ) -> NextToken:
        # What evicts keys leaves as many in every row of a run, so a batch of those is one run.
        evicts = bool(outputs(self.program.prefill).get("held"))
        out = self._run["prefill"](inputs) if evicts else run_in_groups(self._run["prefill"], inputs)
        held = out.get("held", {})
        if use_cache:
            cache = cache if isinstance(cache, VisualTextCache) else VisualTextCache()
            orders = {"visual_order": streams.visual.order, **{f"kept_{n}": o for n, o in out["kept"].items()}}
            place = (streams.prefix, input_ids.shape[1], streams.next_position)
            cache.fill(out["kv"], orders, streams.text.order, *place, held)
        return NextToken(
            logits=out["logits"],
            cache=cache if use_cache else None,
            kept=self._kept(out["kept"], streams),
            held={int(n): _placed(state[0], streams) for n, state in held.items()} or None,
        )

    def _run_train(self, prompts: Prompts, labels: Tensor, num_items_in_batch: Tensor | int | None) -> NextToken:
        if not self._train:
            self._train = self._train_graphs()
        prepared = prepare(self.program, self._train, prompts, labels)
        assert prepared.following is not None  # there are labels
        streams, asked = prepared.streams, asked_of(prepared.streams, prepared.following)
        inputs = {**prepared.inputs, "asked": asked.columns, "asking": asked.asking}
        loss, out = self._learn(inputs, asked, num_items_in_batch)
        return NextToken(loss=loss, logits=out["logits"], labels=asked.labels, kept=self._kept(out["kept"], streams))

    def _train_graphs(self) -> dict[str, Runner]:
        return training_graphs(self.program)

    def _learn(
        self, inputs: dict[str, Tensor | int], asked: Asked, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, and what the training graph returns."""
        out = self._train["train"](inputs)
        logits = out["logits"]
        loss = ForCausalLMLoss(
            logits, None, logits.shape[-1], num_items_in_batch=num_items_in_batch, shift_labels=asked.labels
        )
        return loss, out

    def prefill_inputs(self, **made: Any) -> tuple[dict[str, Tensor | int], Streams]:
        """What a prefill graph takes, by name, from what the model's processor returns; and the prompts in streams."""
        prepared = prepare(self.program, self._run, Prompts.of(self.program, made))
        return prepared.inputs, prepared.streams

    def _kept(self, chosen: Mapping[str, Tensor], streams: Streams) -> dict[int, Tensor] | None:
        """For each layer before which tokens were selected, the places of those that stay; that of CLS is padding."""
        orders = {0: streams.visual.order} if self.program.shortens else {}
        orders |= {int(layer): order for layer, order in chosen.items()}
        return {layer: _placed(order, streams) for layer, order in orders.items()} or None

    def _check_step(self, input_ids: Tensor, cache: VisualTextCache, until: int) -> None:
        """Raise InputError where these tokens, or those that `generate` lets follow, would go too far."""
        limit = self.program.info.position_limit
        if limit is not None:
            check_step(limit, cache.taken(), max(input_ids.shape[1], until - cache.seen))

    def _run_decode(self, input_ids: Tensor, cache: VisualTextCache) -> NextToken:
        batch, tokens = input_ids.shape
        if cache.evicting and tokens > 1:
            # What a token looks at depends on what left before it.
            *_, last = (self._run_decode(token, cache) for token in input_ids.split(1, 1))
            return last
        steps = torch.arange(tokens, device=input_ids.device).expand(batch, -1)
        order = steps + cache.seen
        assert cache.next_position is not None  # a filled cache has it
        axes = FAMILIES[self.program.info.family].position_axes
        inputs = {
            "text": embed(self.program, input_ids),
            "text_position_ids": (steps + cache.next_position).expand(*axes, -1, -1),
            "text_order": order.contiguous(),
        }
        if self.capture is not None and tokens == 1 and not cache.reordered and not torch.is_grad_enabled():
            logits = captured(self._run["decode"], cache, inputs, self.capture)
            cache.extend([], order)
        else:
            out = self._run["decode"]({**cache.inputs(whole=self.backend in WHOLE_BUFFERS), **inputs})
            logits = out["logits"]
            cache.extend(out["kv"], order, out.get("scores"))
        return NextToken(logits=logits, cache=cache)

    def get_input_embeddings(self) -> nn.Module:
        """The module that holds the token embedding's weight; adapters ask for it."""
        return self._owner("embed")

    def get_output_embeddings(self) -> nn.Module:
        """The module that holds the head's weight."""
        return self._owner("head")

    def _owner(self, short: str) -> nn.Module:
        paths = self.program.info.paths
        name = paths[short] if paths[short] in self.weights.names else paths["embed"]  # a head may be tied
        return self.weights.get_submodule(name.rpartition(".")[0])

    def can_generate(self) -> bool:
        """Yes: `generate` works as for any transformers model."""
        return True

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool | None = None,
        **options: Any,
    ) -> None:
        """Write the program, its weights and configuration to a new folder; see `foveate.artifact`.

        state_dict, is_main_process: given by `transformers.Trainer`, which makes the folder itself; then the files are
        put into it, by the main process alone.
        """
        from foveate.artifact import save, save_into

        if options:
            raise InputError(f"save_pretrained does not take {', '.join(options)}")
        if is_main_process is None and state_dict is None:
            save(self, Path(save_directory))
        elif is_main_process is not False:
            save_into(self, Path(save_directory), state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module; the names may also be those of a saved folder, which are Hugging Face's."""
        named = {name if name.startswith(OWN) else OWN + name: value for name, value in state_dict.items()}
        return super().load_state_dict(named, strict, assign)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> OptimizedModel:
        """Use `foveate.load` instead."""
        raise InputError("an optimized model is loaded with foveate.load(folder)")


def training_graphs(program: Program) -> dict[str, Runner]:
    """`vision` and `train`, runnable; eager whatever the backend.

    Compiled backward graphs do not hold for every size of prompt yet.
    """
    graphs = {**program.tower, "train": derive_train(program)}
    return {name: lower_graph(program, "eager", name, graph) for name, graph in graphs.items()}


def _placed(order: Tensor, streams: Streams) -> Tensor:
    """The places in the prompt that tokens [B, ..., k] stand for, `PAD` for none."""
    spare = order == PAD
    found = streams.origin.gather(1, order.masked_fill(spare, 0).flatten(1))
    return found.view_as(order).masked_fill(spare, PAD)


def _asked_for(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a Hugging Face call that ask for something; some ask for what a program does anyway."""
    harmless = {"return_dict", "logits_to_keep", "cache_position", "next_sequence_length", "is_first_iteration"}
    return {k: v for k, v in options.items() if v is not None and v is not False and k not in harmless}
