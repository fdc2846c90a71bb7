"""How Programs run: what they are, the scheduler that batches them, and the processes that share the work."""

from patchkit.runtime.batching import MAX_BATCH_TOKENS as MAX_BATCH_TOKENS
from patchkit.runtime.batching import length_buckets as length_buckets
from patchkit.runtime.content import content_digest as content_digest
from patchkit.runtime.execution import Execution as Execution
from patchkit.runtime.execution import Watcher as Watcher
from patchkit.runtime.execution import current_execution as current_execution
from patchkit.runtime.execution import use_execution as use_execution
from patchkit.runtime.failures import ItemsFailed as ItemsFailed
from patchkit.runtime.failures import LeftOut as LeftOut
from patchkit.runtime.failures import without_failures as without_failures
from patchkit.runtime.interrupts import Terminated as Terminated
from patchkit.runtime.journal import Journal as Journal
from patchkit.runtime.launch import joined_processes as joined_processes
from patchkit.runtime.launch import started_processes as started_processes
from patchkit.runtime.probe import load_hosted as load_hosted
from patchkit.runtime.processes import Group as Group
from patchkit.runtime.processes import launched as launched
from patchkit.runtime.processes import placement as placement
from patchkit.runtime.program import Cost as Cost
from patchkit.runtime.program import Program as Program
from patchkit.runtime.program import Progress as Progress
from patchkit.runtime.program import Summing as Summing
from patchkit.runtime.scheduler import run_program as run_program
from patchkit.runtime.serving import serve as serve
from patchkit.runtime.sessions import Session as Session
from patchkit.runtime.sharing import announce_model as announce_model
