"""Keep what other libraries say to themselves out of a command's output."""

from __future__ import annotations

import logging
import os
import sys
from importlib.util import find_spec


def hush() -> None:
    """Import transformers without its advice and progress bars; the environment may ask for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch._inductor", "torch._dynamo", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def spare_torch() -> None:
    """Let transformers do without torch, which it imports wherever it is installed and which takes seconds.

    For a process that needs no more of transformers than a processor: nothing in it can import torch afterwards. Left
    out where torch is there already, or where torchvision is: without it a processor may make other pixels.
    """
    if "torch" not in sys.modules and find_spec("torchvision") is None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # how Python itself marks what cannot be imported
