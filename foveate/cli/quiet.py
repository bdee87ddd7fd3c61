"""Keep what other libraries say to themselves out of a command's output."""

from __future__ import annotations

import logging
import os


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
