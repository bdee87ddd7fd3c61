"""Triton's Python model of a foveate package: runs the graphs that Triton serves beside it, token by token, greedily.

    input_ids, attention_mask [B, S], pixel_values [images, ...], max_new_tokens [1]  ->  token_ids [B, tokens]

`foveate` answers once. `foveate_stream`, the same file under the decoupled policy, sends token_ids [B, 1] after every
step. Rows that have ended are padded. Written by `foveate export --serving triton`; it needs numpy and nothing of
foveate. Between steps the keys and values are arrays of this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton puts it there

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

PAD = 2**63 - 1
"""The `order` of padding: behind every token."""

NOWHERE = -(2**11)
"""Row and column of a visual token that has no place in its image."""

NEW_TOKENS = 32
"""Length of an answer where the request does not say."""


class RequestError(Exception):
    """A request that cannot be answered; the message says what would be right."""


class TritonPythonModel:
    """What Triton looks for in this file."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the exporter wrote into the configuration."""
        config = json.loads(args["model_config"])
        self.about: dict[str, Any] = {
            name: json.loads(value["string_value"]) for name, value in config["parameters"].items()
        }
        self.inputs = [each["name"] for each in config["input"]]
        self.streams = bool(pb_utils.using_decoupled_model_transaction_policy(config))

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answer requests one after another."""
        if not self.streams:
            return [self._whole(request) for request in requests]
        for request in requests:
            self._stream(request, request.get_response_sender())
        return None

    def _whole(self, request: Any) -> Any:
        try:
            tokens = np.stack([*self._answer(request, request.is_cancelled)], 1)
        except Exception as error:  # left to Triton, it would fail the other requests too
            return _failed(error)
        return _answered(tokens)

    def _stream(self, request: Any, sender: Any) -> None:
        try:
            for tokens in self._answer(request, sender.is_cancelled):
                sender.send(_answered(tokens[:, None]))
        except Exception as error:  # as above; and the stream would have no end
            sender.send(_failed(error))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, cancelled: Callable[[], bool]) -> Iterator[Array]:
        """The next token of each row, int64 [B], until all rows have ended or nobody waits."""
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
        given: Arrays = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
        ids, real, new_tokens = checked(self.about, given)
        prompt, streams = arrange(self.about, ids, real, self._images(given, ids))
        embeds = prompt.joined(self._run("embed_tokens", {"input_ids": ids})["inputs_embeds"])
        stands = {f"{name}_embeds": taken(embeds, streams[f"{name}_index"]) for name in ("visual", "text")}
        out = self._run("decoder_prefill", {**streams, **stands})
        cache = filled(out, streams)
        ended = np.zeros(len(ids), bool)
        for number in range(new_tokens):
            tokens = np.where(ended, self.about["pad_token_id"], out["logits"][:, -1].argmax(-1))
            yield tokens
            ended |= np.isin(tokens, self.about["eos_token_ids"])
            if ended.all() or number + 1 == new_tokens or cancelled():
                return
            order = np.full((len(ids), 1), ids.shape[1] + number)
            embeds = self._run("embed_tokens", {"input_ids": tokens[:, None]})["inputs_embeds"]
            new = {"inputs_embeds": embeds, "position_ids": prompt.next_position + number, "order": order}
            out = self._run("decoder_step", {**cache, **new})
            extend(cache, out, order)

    def _images(self, given: Arrays, ids: Array) -> Images | None:
        """The visual tokens of the images of a request."""
        tokens, count = int((ids == self.about["image_token_id"]).sum()), len(given.get("pixel_values", ()))
        if tokens != count * self.about["tokens_per_image"]:
            raise RequestError(
                f"input_ids holds {tokens} image tokens, and pixel_values {count} images, which are "
                f"{self.about['tokens_per_image']} tokens each"
            )
        if not count:
            return None
        for name in self.about["graphs"]["vision_encoder"][0]:
            if len(given.get(name, ())) != count:
                raise RequestError(f"{name} must have a row for each of the {count} images")
        out = self._run("vision_encoder", given)
        if "vision_rest" in self.about["graphs"]:
            places = out["source"][:, : int(out["count"].max())]
            out = self._run("vision_rest", {"hidden": out["image_features"], "places": places, "count": out["count"]})
        return Images(out)

    def _run(self, model: str, given: Arrays) -> Arrays:
        """Ask Triton to run a graph; it is given what it takes of `given`."""
        takes, returns = self.about["graphs"][model]
        response = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=returns,
            inputs=[_tensor(name, given[name]) for name in takes],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in returns}


class Images:
    """Visual tokens [images, width, D]; the place on the grid that each stands for, and how many of them there are."""

    def __init__(self, out: Arrays) -> None:
        self.features, self.source = out["image_features"], out.get("source")
        self.width = self.features.shape[1]
        self.shortened = "source" in out or "count" in out
        self.count = out.get("count", np.full(len(self.features), self.width))


class Prompt:
    """Where visual tokens stand in a batch of prompts, and the position [B, 1] of the first new token."""

    def __init__(self, images: Images | None, image: Array, feature: Array, next_position: Array) -> None:
        self.images, self.image, self.feature, self.next_position = images, image, feature, next_position

    def joined(self, embeds: Array) -> Array:
        """Embeddings [B, S, D] of text with those of images in their places."""
        if self.images is None or not self.images.width:
            return embeds
        features = self.images.features.reshape(-1, embeds.shape[2])
        return np.where(self.image[..., None], features[self.feature], embeds)


def checked(about: dict[str, Any], given: Arrays) -> tuple[Array, Array, int]:
    """Ids and mask [B, S], and how many tokens to make; RequestError where they are none."""
    ids = given["input_ids"]
    real = given.get("attention_mask", np.ones_like(ids)).astype(bool)
    new_tokens = int(given.get("max_new_tokens", np.array([NEW_TOKENS]))[0])
    if not ids.size or real.shape != ids.shape or not real.any(1).all():
        raise RequestError("input_ids and attention_mask must have one shape [batch, tokens], and a token in every row")
    if (((ids < 0) | (ids >= about["vocabulary"])) & (ids != about["image_token_id"])).any():
        raise RequestError(
            f"input_ids holds ids outside the vocabulary, which has {about['vocabulary']}, numbered from 0"
        )
    if new_tokens < 1 or ids.shape[1] + new_tokens > about["longest"]:
        raise RequestError(
            f"max_new_tokens is {new_tokens} and the prompt {ids.shape[1]} tokens long; it must be at least 1, and "
            f"both together at most {about['longest']}"
        )
    return ids, real, new_tokens


def arrange(about: dict[str, Any], ids: Array, real: Array, images: Images | None) -> tuple[Prompt, Arrays]:
    """Prompts [B, S] as two streams: visual tokens at the left of theirs, text at the right, the rest is padding.

    A row's last token goes with the text even where it is an image's, because it gives the logits.
    """
    image = ids == about["image_token_id"]
    nth = np.maximum(image.cumsum().reshape(ids.shape) - 1, 0)
    number, within = np.divmod(nth, about["tokens_per_image"])
    feature, source = within, within
    if images is not None and images.width:
        feature = number * images.width + np.minimum(within, images.width - 1)
        source = within if images.source is None else images.source.ravel()[feature]
    if images is not None and images.shortened:
        real = real & ~(image & (within >= images.count[number]))
        if not real.any(1).all():
            raise RequestError("a row holds nothing but image tokens, none of which is left: give it text")
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    last = np.where(real, places, -1).max(1, keepdims=True)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    visual = image & real & (places != last)
    streams: Arrays = {}
    for name, member, right in (("visual", visual, False), ("text", real & ~visual, True)):
        width = int(member.sum(1).max())
        index = np.argsort(member if right else ~member, axis=1, kind="stable")
        index = index[:, ids.shape[1] - width :] if right else index[:, :width]
        valid = np.take_along_axis(member, index, 1)
        streams[f"{name}_index"] = index = np.where(valid, index, 0)
        streams[f"{name}_order"] = np.where(valid, index, PAD)
        streams[f"{name}_position_ids"] = np.where(valid, np.take_along_axis(positions, index, 1), 0)
    of, place = (np.take_along_axis(each, streams["visual_index"], 1) for each in (number, source))
    coords = np.stack([of, *np.divmod(place, about["columns"])], 2)
    coords[..., 1:][place < 0] = NOWHERE
    coords[streams["visual_order"] == PAD] = -1
    streams["visual_coords"] = coords
    return Prompt(images, image, feature, np.take_along_axis(positions, last, 1) + 1), streams


def taken(values: Array, index: Array) -> Array:
    """The values [B, k, D] at places [B, k]."""
    return np.take_along_axis(values, index[..., None], 1)


def filled(out: Arrays, streams: Arrays) -> Arrays:
    """What the first step takes of what a prefill returned, by its names there."""
    cache = {"visual_order": streams["visual_order"], "past_order": streams["text_order"]}
    for name, value in out.items():
        kind, _, rest = name.partition(".")
        if kind == "present":
            cache[f"past_key_values.{rest}"] = value
        elif kind in ("visual", "keep"):
            cache[name] = value
        elif name.endswith(".places"):  # of a block of both streams' keys; a row has as many in every head
            cache[f"held_order_{rest.removesuffix('.places')}"] = value[:, 0]
        elif kind == "held":
            cache[name], cache[f"past_key_values.{rest}"] = value, value[:, :, :0]
            cache["past_order"] = streams["text_order"][:, :0]
    return cache


def extend(cache: Arrays, out: Arrays, order: Array) -> None:
    """Put a step's keys and values behind those that are there."""
    cache["past_order"] = np.concatenate([cache["past_order"], order], 1)
    for name, value in out.items():
        kind, _, rest = name.partition(".")
        if kind == "new":
            past = f"past_key_values.{rest}"
            cache[past] = np.concatenate([cache[past], value], 2)


def _tensor(name: str, array: Array) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(array))


def _answered(tokens: Array) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[_tensor("token_ids", tokens)])


def _failed(error: Exception) -> Any:
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, RequestError) else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
