"""What every test shares: one thread per process, and no network."""

from __future__ import annotations

import os

# Before transformers is imported: a test that reaches for the hub fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before nnsight, which adds a method to `object` that beartype cannot be imported after.
import beartype  # noqa: F401
import torch

torch.set_num_threads(1)
