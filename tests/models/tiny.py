"""Small random models of the families that are traced, and how their graphs are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

import foveate.kernels  # noqa: F401  # what graphs run on
from foveate.ir.program import Program

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB = 32, 3, 4, 2, 48, 64

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def qwen2_vl(device: str = "cpu", text: dict[str, Any] | None = None) -> Any:
    """A Qwen2-VL with 8-pixel patches; `text` changes its decoder."""
    width = (text or {}).get("hidden_size", HIDDEN)
    tower = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": width, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **(text or {})},
        vision_config=tower,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        tie_word_embeddings=False,
    )
    return build(config, device)


def qwen2_5_vl(device: str = "cpu", text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    """A Qwen2.5-VL with windows of two by two tokens; `text` changes its decoder, `vision` its tower."""
    tower = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        **(vision or {}),
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **(text or {})},
        vision_config=tower,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        tie_word_embeddings=False,
    )
    return build(config, device)


def qwen3_vl(
    device: str = "cpu",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    kind: Any = Qwen3VLConfig,
) -> Any:
    """A Qwen3-VL with DeepStack behind two of its three layers; `text` changes its decoder, `vision` its tower."""
    tower = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 8,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        **(vision or {}),
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000.0, "mrope_interleaved": True}
    config = kind(
        text_config={**TEXT, "head_dim": HIDDEN // HEADS, "rope_parameters": rope, **(text or {})},
        vision_config=tower,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        tie_word_embeddings=False,
    )
    return build(config, device)


def qwen3_vl_moe(device: str = "cpu", text: dict[str, Any] | None = None) -> Any:
    """A Qwen3-VL of which each token takes two of five experts, but in its second layer, which has none."""
    own = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": FFN // 2, "mlp_only_layers": [1]}
    return qwen3_vl(device, {**own, **(text or {})}, kind=Qwen3VLMoeConfig)


def internvl(decoder: str = "llama", device: str = "cpu", vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """An InternVL with four visual tokens a tile; `vision` changes its tower, `text` its decoder."""
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 32,
        "patch_size": 8,
        **(vision or {}),
    }
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 10000.0)}
    own = {"head_dim": 16} if decoder == "qwen3" else {}  # wider than a share of the hidden size, as some Qwen3 have
    config = InternVLConfig(
        text_config={"model_type": decoder, **TEXT, **own, "rope_parameters": rope, **text},
        vision_config=tower,
        image_token_id=VOCAB - 1,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return build(config, device)


PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
"""Tiles down and across of the resolutions of LLaVA-NeXT."""


def llava(decoder: str = "qwen2", device: str = "cpu", vision: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A LLaVA of 4 x 4 patches with a SigLIP tower; `vision` changes that, `text` (of `changes`) its decoder."""
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 34,
        "patch_size": 8,
        **(vision or {}),
    }
    if tower["model_type"] == "siglip_vision_model":
        tower.setdefault("vision_use_head", False)
    text = {"model_type": decoder, **TEXT, **({"sliding_window": None} if decoder == "mistral" else {})}
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **changes}
    config = LlavaConfig(
        text_config={**text, **settings.pop("text", {})},
        vision_config=tower,
        image_token_index=VOCAB - 1,
        **settings,
    )
    return build(config, device)


def llava_next(
    decoder: str = "llama", device: str = "cpu", vision: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A LLaVA-NeXT with tiles of 3 x 3 patches; `vision` changes its tower, `text` (of `changes`) its decoder."""
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 24,
        "patch_size": 8,
        **(vision or {}),
    }
    text = {"model_type": decoder, **TEXT, **({"sliding_window": None} if decoder == "mistral" else {})}
    settings = {"image_grid_pinpoints": [[24 * down, 24 * across] for down, across in PINPOINTS], **changes}
    config = LlavaNextConfig(
        text_config={**text, **settings.pop("text", {})},
        vision_config=tower,
        image_token_index=VOCAB - 1,
        **settings,
    )
    return build(config, device)


def llava_onevision(
    decoder: str = "qwen2", device: str = "cpu", vision: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A LLaVA-OneVision with tiles of 3 x 3 patches, shrunk beyond two; `vision` and `text` change its parts."""
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 26,
        "patch_size": 8,
        "vision_use_head": False,
        **(vision or {}),
    }
    grids = [[down, across] for down in (1, 2, 3) for across in (1, 2, 3)]
    settings: dict[str, Any] = {
        "image_grid_pinpoints": [[26 * down, 26 * across] for down, across in grids],
        "vision_aspect_ratio": "anyres_max_2",
        **changes,
    }
    config = LlavaOnevisionConfig(
        text_config={"model_type": decoder, **TEXT, **settings.pop("text", {})},
        vision_config=tower,
        image_token_index=VOCAB - 1,
        video_token_index=VOCAB - 2,
        **settings,
    )
    return build(config, device)


def smolvlm(kind: str = "smolvlm", device: str = "cpu", **vision: Any) -> Any:
    """A SmolVLM, or an Idefics3, with four visual tokens a tile; vision: changes of its tower."""
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 33,
        "patch_size": 8,
        **vision,
    }
    config = AutoConfig.for_model(
        kind,
        text_config={"model_type": "llama", **TEXT},
        vision_config=tower,
        image_token_id=VOCAB - 1,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return build(config, device)


def gemma3(device: str = "cpu", kinds: str = "full sliding full", **text: Any) -> Any:
    """A Gemma 3 with nine visual tokens an image; kinds: what its layers see, six tokens or all."""
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    own = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6, "max_position_embeddings": 512}
    config = Gemma3Config(
        text_config={**TEXT, **own, "layer_types": [f"{kind}_attention" for kind in kinds.split()], **text},
        vision_config={"model_type": "siglip_vision_model", **tower, "image_size": 48, "patch_size": 8},
        mm_tokens_per_image=9,
        image_token_index=VOCAB - 1,
        tie_word_embeddings=False,
    )
    return build(config, device)


def build(config: Any, device: str = "cpu") -> Any:
    """The model of a configuration, with weights that are large enough to matter."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        made = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in made.parameters() if device != "meta" else ():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
        if device != "meta":
            with torch.no_grad():
                made.lm_head.weight[-2:] = 0  # never the most likely token: those of images and videos
    return made


def run(program: Program, graph: fx.Graph, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a graph returns, given its inputs by name."""
    names = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        result: dict[str, Any] = fx.GraphModule(program.weights, graph)(*(inputs[n] for n in names))
    return result


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
