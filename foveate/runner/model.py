"""An exported package as a model over numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import BackendError, InputError
from foveate.manifest import GRAPHS, MANIFEST, read_manifest, reading
from foveate.positions import check_positions, check_step
from foveate.runner.cache import ArrayWriter, Cache, Writer
from foveate.runner.choosing import Chooser
from foveate.runner.device import GraphWriter
from foveate.runner.prompts import Array, Images, Streams, Vocabulary, arrange, taken
from foveate.runner.sessions import Device, Session
from foveate.runner.settings import SAMPLING, Settings
from foveate.runner.steps import stepped

ORDINARY = "load the package without tensors='np'"


@dataclass(frozen=True)
class NextLogits:
    """What a call returns.

    logits: [B, 1, V] of the token after the last. cache: what the next call goes on from. kept: for each layer before
    which visual tokens were selected, the places in the prompt of those that stay, int64 [B, k], padded with the
    largest int64. held: the same for cache keys that are evicted, int64 [B, Hk, C].
    """

    logits: Array
    cache: Cache
    kept: dict[int, Array] | None = None
    held: dict[int, Array] | None = None


class NumpyModel:
    """Runs a package as `foveate.OptimizedModel` does, over numpy arrays: `opt(**inputs)`, `opt.generate(**inputs)`.

    Made by `foveate.load(folder, tensors="np")`. passes: what was done to the model, as text. longest: tokens of a
    prompt with its answer.
    """

    backend = "onnx"

    def __init__(self, graphs: dict[str, Session], about: Vocabulary, settings: Settings, passes: list[str]) -> None:
        self.about, self.passes, self.longest = about, passes, about.longest
        self.graphs, self.settings = graphs, settings
        # Positions close over what a selection in the tower lets go.
        self.closes = not {"source", "count"}.isdisjoint(graphs["vision"].outputs)
        step = self.graphs["decode"]
        if any(name.startswith("scores.") for name in step.outputs):
            raise BackendError(f"steps that evict keys (heavy-recent) do not run over numpy arrays: {ORDINARY}")
        buffers = [name for name in step.inputs if name.startswith("past_key_values.")]
        half = any(step.dtype(name) == np.float16 for name in buffers)
        device = step.device
        self.writer: Writer = ArrayWriter(device) if device.is_host else GraphWriter(device, buffers, half)

    @property
    def device(self) -> Device:
        """Where the graphs run and the cache lies."""
        return self.writer.device

    def __call__(
        self,
        input_ids: Any,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        questions: Any = None,
        cache: Cache | None = None,
        **options: Any,
    ) -> NextLogits:
        """Next-token logits of a batch of prompts, or of their continuation when a cache is given, which grows.

        Takes what the model's processor returns, as arrays. questions: fp32 [images, P] of `foveate.questions`, where a
        pass asks for them. Raises InputError where the inputs do not fit together, or go beyond the model's positions.
        """
        _refuse(options)
        ids = self._ids(input_ids)
        if cache is None:
            return self._first(ids, pixel_values, attention_mask, position_ids, questions)
        if ids.ndim != 2 or not ids.size or len(ids) != len(cache.order):
            raise InputError(f"input_ids has shape {ids.shape}; the cache goes on with [{len(cache.order)}, tokens]")
        check_step(self.about.position_limit, cache.taken(), ids.shape[1])
        return NextLogits(stepped(self.graphs["embed"], self.graphs["decode"], cache, ids), cache)

    def _first(
        self, ids: Array, pixel_values: Any, attention_mask: Any, position_ids: Any, questions: Any, new_tokens: int = 1
    ) -> NextLogits:
        """What a call returns for prompts; those and their answers are held to the model's positions first."""
        mask, positions = (None if x is None else np.asarray(x, np.int64) for x in (attention_mask, position_ids))
        limit = self.about.position_limit
        if limit is not None and not self.closes:
            check_positions(limit, taken(ids, mask, positions), new_tokens)
        images = self._images(pixel_values, questions)
        streams = arrange(self.about, ids, mask, positions, images)
        if limit is not None and self.closes:
            check_positions(limit, streams.taken(), new_tokens)
        return self._prefill(ids, streams, images)

    def _prefill(self, ids: Array, streams: Streams, images: Images | None) -> NextLogits:
        text = self.graphs["embed"].run({"input_ids": _taken(ids, streams.text.index)})["inputs_embeds"].read()
        visual = np.zeros((len(text), 0, text.shape[2]), text.dtype)
        if images is not None and images.width:
            flat = images.features.reshape(-1, text.shape[2])
            visual = flat[_taken(streams.feature, streams.visual.index)]
            # The last visual token of a prompt that ends in an image travels with the text.
            moved = _taken(streams.image, streams.text.index)
            text = np.where(moved[..., None], flat[_taken(streams.feature, streams.text.index)], text)
        given: dict[str, Array] = {"visual_embeds": visual, "text_embeds": text, "visual_coords": streams.coords}
        for name, stream in (("visual", streams.visual), ("text", streams.text)):
            given |= {f"{name}_position_ids": stream.position_ids, f"{name}_order": stream.order}
        if "text_reach" in self.graphs["prefill"].inputs:
            given |= streams.reaches()
        found = self.graphs["prefill"].run(given, stay=("present.", "visual.", "held."))
        orders = {0: streams.visual.order} if "source" in self.graphs["vision"].outputs else {}
        orders |= {int(name[5:]): value.read() for name, value in found.items() if name.startswith("keep.")}
        places = {int(name.split(".")[1]): value.read() for name, value in found.items() if name.endswith(".places")}
        return NextLogits(
            logits=found["logits"].read(),
            cache=Cache(self.writer, self.graphs["decode"], found, streams, ids.shape[1]),
            kept={layer: streams.placed(order) for layer, order in orders.items()} or None,
            held={layer: streams.placed(order) for layer, order in places.items()} or None,
        )

    def generate(
        self,
        input_ids: Any,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        questions: Any = None,
        streamer: Any = None,
        **options: Any,
    ) -> Array:
        """Prompts and their answers int64 [B, S + n], as the ordinary model's `generate` returns them.

        options: those of `Settings` (max_new_tokens, do_sample, temperature, top_k, top_p, seed, eos_token_id, ...), in
        place of what `generation_config.json` says. streamer: called with the tokens int64 [B] of each step; or one of
        transformers. Greedy answers are those of the ordinary model; samples are drawn from the same probabilities,
        but by numpy. Raises InputError for beams and whatever else is not done here.
        """
        settings = self._settings(options)
        ids = self._ids(input_ids)
        parts = [ids]
        put = getattr(streamer, "put", streamer)
        if put is not streamer:
            put(ids)
        new_tokens = settings.new_tokens(ids.shape[-1])
        first = self._first(ids, pixel_values, attention_mask, position_ids, questions, new_tokens)
        for tokens in self._answer(first, settings):
            parts.append(tokens[:, None])
            if put is not None:
                put(tokens)
        if put is not streamer:
            streamer.end()
        return np.concatenate(parts, 1)

    def tokens(self, first: NextLogits, **options: Any) -> Iterator[Array]:
        """The answer to prompts that were called, int64 [B] a step; options as `generate` takes them.

        Raises InputError where the longest answer would go beyond the model's positions.
        """
        settings, cache = self._settings(options), first.cache
        check_step(self.about.position_limit, cache.taken(), settings.new_tokens(cache.seen) - 1)
        return self._answer(first, settings)

    def _answer(self, first: NextLogits, settings: Settings) -> Iterator[Array]:
        choose, logits, cache = Chooser(settings), first.logits, first.cache
        done, longest = np.zeros(len(logits), bool), settings.new_tokens(cache.seen)
        for number in range(longest):
            chosen = np.where(done, settings.padding, choose(logits[:, -1].astype(np.float32)))
            done |= np.isin(chosen, settings.eos_token_id)
            yield chosen
            if done.all() or number + 1 == longest:
                return
            logits = self(chosen[:, None], cache=cache).logits

    def _settings(self, options: dict[str, Any]) -> Settings:
        settings = self.settings.given(options)
        idle = [name for name in SAMPLING if options.get(name) is not None]
        if idle and not settings.do_sample:
            raise InputError(f"{', '.join(idle)}: of sampling, which needs do_sample=True")
        return settings

    def _ids(self, given: Any) -> Array:
        ids = np.ascontiguousarray(given, np.int64)
        # The image token may lie outside the table; its row is replaced by a visual embedding.
        safe = np.where(ids == self.about.image_token_id, 0, ids)
        if safe.size and not 0 <= safe.min() <= safe.max() < self.about.vocabulary:
            raise InputError(
                f"input_ids holds {safe.max()}; the vocabulary has {self.about.vocabulary} tokens, numbered from 0"
            )
        return ids

    def _images(self, pixel_values: Any, questions: Any) -> Images | None:
        """The visual tokens of all images of the batch."""
        vision = self.graphs["vision"]
        asks = "questions" in vision.inputs
        if questions is not None and not asks:
            raise InputError("this model chooses nothing by a question; leave questions out")
        if pixel_values is None or not len(pixel_values):
            return None
        pixels, expected = np.asarray(pixel_values), tuple(vision.inputs["pixel_values"].shape[1:])
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise InputError(
                f"pixel_values has shape {pixels.shape}; this model takes [images, {', '.join(map(str, expected))}]"
            )
        given = {"pixel_values": pixels.astype(vision.dtype("pixel_values"), copy=False)}
        if asks:
            wanted = (len(pixels), vision.inputs["questions"].shape[1])
            if questions is None or np.shape(questions) != wanted:
                raise InputError(
                    f"this model chooses visual tokens by the question: give questions={list(wanted)}, one row an "
                    f"image, as foveate.questions makes them; there is {'none' if questions is None else 'another'}"
                )
            given["questions"] = np.asarray(questions, np.float32)
        out = {name: value.read() for name, value in vision.run(given).items()}
        if "vision_rest" in self.graphs:
            left = out["source"][:, : int(out["count"].max())]
            rest = {"hidden": out["image_features"], "places": left, "count": out["count"]}
            out = {name: value.read() for name, value in self.graphs["vision_rest"].run(rest).items()}
        return Images(out["image_features"], out.get("source"), out.get("count"))


def open_package(folder: Path, device: str | None = None) -> NumpyModel:
    """Open what `foveate.export` wrote; device: `cpu`, `cuda`, `cuda:1`, or the best there is.

    Raises ArtifactError for a folder that is damaged or foreign, BackendError for one that numpy cannot run.
    """
    manifest = read_manifest(folder)
    needed = [file for name, file in GRAPHS.items() if name != "vision_rest"]
    if manifest.get("backend") != "onnx" or not set(needed) <= set(manifest["files"]):
        raise BackendError(f"{folder} is no exported package; foveate export makes one, or {ORDINARY}")
    if "prompts" not in manifest:
        raise BackendError(f"{folder} says nothing of its prompts, so images are not all of one grid: {ORDINARY}")
    with reading(folder / MANIFEST):
        about = Vocabulary.of(manifest["prompts"])
        passes = [str(record["text"]) for record in manifest["passes"]]
    settings = Settings.read(folder / "generation_config.json")
    where, files = Device.named(device), manifest["files"]
    graphs = {name: Session(folder / file, where) for name, file in GRAPHS.items() if file in files}
    return NumpyModel(graphs, about, settings, passes)


def _taken(values: Array, index: Array) -> Array:
    return np.take_along_axis(values, index, 1)


def _refuse(options: dict[str, Any]) -> None:
    """Options of the Hugging Face call that are not heeded here are errors, not ignored."""
    unknown = sorted(name for name, value in options.items() if value is not None and value is not False)
    if unknown:
        raise InputError(
            f"a package over numpy arrays does not take {', '.join(unknown)}; it takes input_ids, pixel_values, "
            "attention_mask, position_ids, questions and cache"
        )
