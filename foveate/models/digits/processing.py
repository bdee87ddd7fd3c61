"""The processor: a word-level tokenizer and the CLIP image processor at 96 x 96 pixels."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from foveate.models.digits.data import SIZE
from foveate.models.digits.questions import EMPTY

PATCH = 8
"""Pixels along one side of a patch of the vision tower."""

PATCH_SIDE = SIZE // PATCH
"""Patches along one side of the image."""

VISUAL_TOKENS = PATCH_SIDE**2

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    "user:",
    "assistant:",
    *(str(number) for number in range(17)),
    EMPTY,
    ",",
    "?",
    ".",
    "which",
    "digit",
    "is",
    "at",
    "row",
    "column",
    "how",
    "many",
    "are",
    "there",
    "read",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words, numbers and punctuation marks are one token each; `<s>` is put in front."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # A speaker's name keeps its colon, so a turn costs one token.
    words = pre_tokenizers.Split(Regex(r"[a-z]+:|\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The LLaVA processor of the model; one `<image>` becomes `VISUAL_TOKENS` of them."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
