"""Prompts in token ids: pairs, desiderata, batches, and the metrics that score them."""

from patchkit.data.batch import Batch as Batch
from patchkit.data.batch import positions as positions
from patchkit.data.desiderata import Triple as Triple
from patchkit.data.desiderata import from_dataset as from_dataset
from patchkit.data.desiderata import read_desiderata as read_desiderata
from patchkit.data.desiderata import to_dataset as to_dataset
from patchkit.data.desiderata import write_desiderata as write_desiderata
from patchkit.data.metrics import METRICS as METRICS
from patchkit.data.metrics import Metric as Metric
from patchkit.data.metrics import accuracy as accuracy
from patchkit.data.metrics import check_metric as check_metric
from patchkit.data.metrics import kl as kl
from patchkit.data.metrics import logit_diff as logit_diff
from patchkit.data.metrics import prob_diff as prob_diff
from patchkit.data.metrics import resolve_metric as resolve_metric
from patchkit.data.metrics import target_logprob as target_logprob
from patchkit.data.pairs import Pair as Pair
from patchkit.data.pairs import read_pairs as read_pairs
from patchkit.data.pairs import write_pairs as write_pairs
from patchkit.data.splits import drop_uninformative as drop_uninformative
from patchkit.data.splits import group as group
from patchkit.data.splits import require_disjoint as require_disjoint
from patchkit.data.splits import require_equal_lengths as require_equal_lengths
from patchkit.data.splits import span_positions as span_positions
from patchkit.data.splits import split_if_needed as split_if_needed
