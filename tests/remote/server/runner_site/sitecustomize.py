"""Python runs this first in the processes of NDIF's sandbox, so that they can build their model without weights.

transformers 5.23 names the class of a task's pipeline by a string, from which nnsight 0.8.1 reads that the task needs no
tokenizer; the build then fails, and the sandbox goes on with `None` for every module.
"""

from __future__ import annotations

from transformers.pipelines import SUPPORTED_TASKS, TextGenerationPipeline

SUPPORTED_TASKS["text-generation"]["impl"] = TextGenerationPipeline
