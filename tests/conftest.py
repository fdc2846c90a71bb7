"""What every test shares: one thread per process, no network, and Ctrl-C that ends."""

from __future__ import annotations

import os
import signal

# A shell in the background starts this with Ctrl-C ignored, and the commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before transformers is imported: a test that reaches for the hub fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before nnsight, which adds a method to `object` that beartype cannot be imported after.
import beartype  # noqa: F401
import torch

torch.set_num_threads(1)
