"""The only place that opens a trace: reading, patching, blending, reusing."""

from patchkit.tracing.capture import (
    Captured as Captured,
)
from patchkit.tracing.capture import (
    Gradients as Gradients,
)
from patchkit.tracing.capture import (
    attention_from as attention_from,
)
from patchkit.tracing.capture import (
    capture as capture,
)
from patchkit.tracing.capture import (
    capture_gradients as capture_gradients,
)
from patchkit.tracing.mask import Blend as Blend
from patchkit.tracing.mask import blended_logits as blended_logits
from patchkit.tracing.patch import Patch as Patch
from patchkit.tracing.patch import run_patched as run_patched
from patchkit.tracing.reuse import Prefix as Prefix
from patchkit.tracing.reuse import compute_prefix as compute_prefix
