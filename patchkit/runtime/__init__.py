"""How Programs run: what they are, and the scheduler that batches them."""

from patchkit.runtime.program import Cost as Cost, Program as Program
from patchkit.runtime.scheduler import (
    MAX_BATCH_TOKENS as MAX_BATCH_TOKENS,
    Progress as Progress,
    length_buckets as length_buckets,
    run_program as run_program,
)
