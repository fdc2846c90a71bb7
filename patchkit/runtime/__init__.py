"""How Programs run: what they are, and the scheduler that batches them."""

from patchkit.runtime.journal import Journal as Journal
from patchkit.runtime.program import Cost as Cost
from patchkit.runtime.program import Program as Program
from patchkit.runtime.program import Summing as Summing
from patchkit.runtime.scheduler import (
    MAX_BATCH_TOKENS as MAX_BATCH_TOKENS,
)
from patchkit.runtime.scheduler import (
    Progress as Progress,
)
from patchkit.runtime.scheduler import (
    length_buckets as length_buckets,
)
from patchkit.runtime.scheduler import (
    run_program as run_program,
)
