"""The only place that opens a trace: reading, patching, blending, reusing."""

from patchkit.tracing.capture import (
    Captured as Captured,
    Gradients as Gradients,
    attention_from as attention_from,
    capture as capture,
    capture_gradients as capture_gradients,
)
from patchkit.tracing.mask import Blend as Blend, blended_logits as blended_logits
from patchkit.tracing.patch import Patch as Patch, run_patched as run_patched
from patchkit.tracing.reuse import Prefix as Prefix, compute_prefix as compute_prefix
