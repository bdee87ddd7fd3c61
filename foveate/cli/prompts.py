"""From the words and files of a command line to what a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate.cli.errors import UseError

if TYPE_CHECKING:
    from PIL.Image import Image


def full_prompt(processor: Any, question: str, images: int) -> str:
    """The prompt around a question: as it is where it places its images itself, else by the chat template.

    Raises UseError where the number of `<image>` marks is not the number of images.
    """
    mark = str(getattr(processor, "image_token", "<image>"))
    if mark not in question:
        if getattr(processor, "chat_template", None) is None:
            raise UseError(f"the processor has no chat template: write the whole prompt, {mark} included")
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        message = {"role": "user", "content": parts}
        return str(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
    marks = question.count(mark)
    if marks != images:
        raise UseError(
            f"the prompt holds {marks} {mark} and {images} image{'s were' if images != 1 else ' was'} given: "
            f"write one {mark} for each --image"
        )
    return question


def encode(model: Any, processor: Any, prompt: str, images: Sequence[Image], new_tokens: int) -> dict[str, Any]:
    """What the model takes, as the processor makes it; UseError for a prompt that is too long."""
    from foveate.examples import model_inputs

    inputs = dict(processor(text=[prompt], images=list(images) or None, return_tensors="pt"))
    check_length(inputs["input_ids"].shape[1], new_tokens, model.config.get_text_config().max_position_embeddings)
    return model_inputs(model, inputs)


def check_length(length: int, new_tokens: int, longest: int) -> None:
    """UseError where a prompt and the longest answer are more tokens than a model takes."""
    if length + new_tokens > longest:
        raise UseError(
            f"the prompt is {length} tokens long and may grow by {new_tokens} (--max-new-tokens); "
            f"this model takes {longest} in all"
        )


def told(
    processor: Any, input_ids: Any, answer: Sequence[Any], image_token: int, kept: dict[int, list[list[int]]]
) -> dict[str, Any]:
    """What `foveate run` tells of one prompt [1, S] and the tokens of its answer; kept: by layer, for each row."""
    return {
        "answer": processor.decode(answer, skip_special_tokens=True).strip(),
        "new_tokens": len(answer),
        "prompt_tokens": input_ids.shape[1],
        "visual_tokens": int((input_ids == image_token).sum()),
        "kept": {str(layer): places[0] for layer, places in kept.items()} if kept else None,
    }
