"""What MODEL means on the command line: the one place that turns a name into a model and its processor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.cli.errors import UseError
from foveate.cli.options import SIZES
from foveate.cli.quiet import hush
from foveate.errors import UnsupportedModelError

DIGITS = "digits"
RANDOM = "random:llava"
SAVED = "foveate.json"
"""The file that marks a folder saved by foveate."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and how to get its processor, which some models do not have."""

    name: str
    model: Any
    get_processor: Callable[[], Any]


def load_model(name: str, sizes: Mapping[str, int] | None = None, dtype: str | None = None) -> Loaded:
    """The model of that name; UseError or UnsupportedModelError say what is wrong.

    sizes: of `random:llava`, as in `options.SIZES`. dtype: a torch dtype's name, else the model's own.
    """
    hush()
    if sizes and name != RANDOM:
        option = SIZES[next(iter(sizes))][0]
        raise UseError(f"{option} is a size of {RANDOM}; {name} has its own")
    if name == DIGITS:
        loaded = _digits()
    elif name == RANDOM:
        loaded = Loaded(RANDOM, random_model(sizes or {}, dtype), _no_processor)
    else:
        loaded = _from_folder(name, find_folder(name))
    if dtype is not None:
        import torch

        loaded.model.to(getattr(torch, dtype))
    return loaded


def is_saved(name: str) -> bool:
    """Whether MODEL is a folder that foveate saved."""
    return (Path(name).expanduser() / SAVED).is_file()


def load_saved(name: str, backend: str | None) -> Any:
    """The optimized model in a folder that foveate saved; ArtifactError if it is damaged."""
    hush()
    import foveate

    return foveate.load(Path(name).expanduser(), backend=backend)


def saved_processor(name: str) -> Any:
    """The processor that lies in such a folder."""
    hush()
    return _processor(Path(name).expanduser())


def find_folder(name: str) -> Path:
    """The local folder of a model; a hub id is downloaded, or found in the cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UseError(f"{name} is a file; MODEL is a folder with a config.json")
    if _looks_like_path(name):
        raise UseError(
            f"there is no folder {name}; MODEL is {DIGITS!r}, {RANDOM!r}, a folder, or a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    return _download(name)


def find_config(name: str) -> Any:
    """The Hugging Face configuration of a folder or hub id; weights are neither read nor downloaded."""
    from transformers import AutoConfig

    path = Path(name).expanduser()
    named = not path.exists() and not _looks_like_path(name)
    folder = _hub_config(name, _online(name)) if named else find_folder(name)
    check_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises on a damaged configuration
        raise UseError(f"{folder}/config.json cannot be read: {_first_line(error)}") from None


def _looks_like_path(name: str) -> bool:
    if not HUB_ID.fullmatch(name) or name.startswith((".", "~", os.sep)):
        return True
    return Path(name).parts[0] not in (".", "") and Path(Path(name).parts[0]).is_dir()


def _digits() -> Loaded:
    from foveate.models import digits

    try:
        model, processor = digits.load()
    except FileNotFoundError as error:
        raise UseError(str(error)) from None
    return Loaded(DIGITS, model, lambda: processor)


def random_model(sizes: Mapping[str, int], dtype: str | None = None, device: str = "cpu") -> Any:
    """`random:llava` of given sizes, as in `options.SIZES`; UseError where they make no model."""
    import torch

    from foveate.models.random import random_llava

    chosen: dict[str, Any] = {name: default for name, (_, default, _) in SIZES.items() if default is not None}
    # A tower this small leaves the decoder to decide the time.
    tower: dict[str, Any] = {"vision_layers": 2, "vision_hidden": 32, "vision_heads": 2}
    try:
        return random_llava(**{**chosen, **sizes}, **tower, dtype=getattr(torch, dtype or "float32"), device=device)
    except ValueError as error:
        raise UseError(f"{RANDOM}: {error}") from None


def _no_processor() -> Any:
    raise UseError(f"{RANDOM} has no processor: it cannot read images or answer")


def _from_folder(name: str, folder: Path) -> Loaded:
    from transformers import AutoModelForImageTextToText

    check_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise UseError(f"{folder} has no *.safetensors file; foveate reads no other weights (pickles can run code)")
    try:
        model, about = AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers raises on a folder that is damaged
        raise UseError(f"the model in {folder} cannot be read: {_first_line(error)}") from None
    missing = sorted(about["missing_keys"])
    if missing:
        raise UseError(f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}")
    return Loaded(name, model.eval(), lambda: _processor(folder))


def check_config(folder: Path) -> None:
    """Raise unless the folder's config.json names a family that foveate knows."""
    from foveate.models.registry import FAMILIES

    if (folder / SAVED).is_file():
        raise UseError(f"{folder} was saved by foveate and is optimized already; give the model it was made from")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UseError(f"{folder} has no config.json, so it is not a model's folder") from None
    except (OSError, ValueError) as error:
        raise UseError(f"{path} cannot be read as JSON: {_first_line(error)}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(kind, str):
        raise UseError(f"{path} does not say its model_type; supported: {known}")
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"model family {kind!r} in {path} is not supported; supported: {known}")


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises on a folder without one
        raise UseError(f"{folder} has no processor that can be read: {_first_line(error)}") from None
    if not hasattr(processor, "image_processor"):
        raise UseError(f"{folder} has a tokenizer but no image processor")
    return processor


def _download(name: str) -> Path:
    """A hub model's folder in the local cache; asks the network once, quickly, before anything long."""
    from huggingface_hub import snapshot_download

    online = _online(name)
    try:
        if online:
            check_config(_hub_config(name, online))
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not online))
    except OSError as error:
        raise UseError(_not_there(name, online, error)) from None


def _hub_config(name: str, online: bool) -> Path:
    """The local folder that holds a hub model's config.json, and maybe nothing else."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=not online)).parent
    except OSError as error:
        raise UseError(_not_there(name, online, error)) from None


def _online(name: str) -> bool:
    """Whether the Hub answers; UseError where it does and refuses the id."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        raise UseError(f"there is no folder {name}, and the Hub refuses that id: {_first_line(error)}") from None
    except Exception:  # offline, or any failure of the transport
        return False
    return True


def _not_there(name: str, online: bool, error: Exception) -> str:
    if online:
        return f"{name} cannot be downloaded: {_first_line(error)}"
    return f"there is no folder {name}, it is not in the local cache, and the Hugging Face Hub cannot be reached"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
