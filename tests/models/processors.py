"""The processors that transformers has for the families, for the small models of `tests.models.tiny`.

Image processors are those over PIL, which need no torchvision. Processors of families that take videos hold a video
processor, which transformers has over torchvision alone: of those families only the image processor is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Gemma3Processor, Idefics3Processor, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.models import tiny

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>", "<global-img>", "<fake_token_around_image>")
WORDS = (*SPECIAL, "<end_of_utterance>", "what", "is", "there", "?", "and", "\n", "\n\n")
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and the marks of all families, as tokens of their own; `<image>` is the image token of the models."""
    words = (*WORDS, *PLACES)
    more = tuple(f"word{number}" for number in range(tiny.VOCAB - 1 - len(words)))
    vocabulary = {word: index for index, word in enumerate((*words, *more, "<image>"))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]+>|\n+|\w+|[^\w\s]"), behavior="removed", invert=True)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marks = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, extra_special_tokens=marks, padding_side="left")


def picture(width: int, height: int) -> Image.Image:
    """An image with something to see."""
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def llava_next() -> Any:
    """Tiles of 24 pixels."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[24 * down, 24 * across] for down, across in tiny.PINPOINTS],
    )
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(images, tokenizer(), **settings)


def idefics3() -> Any:
    """Tiles of 33 pixels, at most two in a row."""
    images = Idefics3ImageProcessorPil(size={"longest_edge": 66}, max_image_size={"longest_edge": 33})
    return Idefics3Processor(images, tokenizer(), image_seq_len=4)


def gemma3() -> Any:
    """Images of 48 pixels."""
    images = Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
    return Gemma3Processor(images, tokenizer(), image_seq_length=9)


@dataclass(frozen=True)
class Whole:
    """A model, its processor, and how a prompt says where an image is."""

    model: Callable[[], Any]
    processor: Callable[[], Any]
    mark: str = "<image>"


WHOLE = {
    "llava-next": Whole(tiny.llava_next, llava_next),
    "idefics3": Whole(lambda: tiny.smolvlm("idefics3"), idefics3),
    "gemma3": Whole(tiny.gemma3, gemma3, "<boi>"),
}
"""Families whose processors need no torchvision; that of LLaVA is tested with the bundled model."""

QWEN = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})

IMAGES: dict[str, tuple[Callable[[], Any], Any]] = {
    "qwen2-vl": (tiny.qwen2_vl, QWEN),
    "qwen2.5-vl": (tiny.qwen2_5_vl, QWEN),
    "qwen3-vl": (tiny.qwen3_vl, QWEN),
    "internvl": (
        lambda: tiny.internvl("qwen3"),
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6),
    ),
    "llava-onevision": (
        tiny.llava_onevision,
        LlavaOnevisionImageProcessorPil(
            size={"height": 26, "width": 26},
            image_grid_pinpoints=[[26 * down, 26 * across] for down in (1, 2, 3) for across in (1, 2, 3)],
        ),
    ),
    "smolvlm": (
        tiny.smolvlm,
        SmolVLMImageProcessorPil(size={"longest_edge": 66}, max_image_size={"longest_edge": 33}),
    ),
}
"""Models and image processors of families whose whole processors need torchvision."""
