"""The methods, one file each."""

from patchkit.methods._mask_layout import Layout as Layout
from patchkit.methods._mask_objective import Objective as Objective
from patchkit.methods._mask_prepare import mask_cost as mask_cost
from patchkit.methods._mask_train import Schedule as Schedule
from patchkit.methods.desiderata_mask import MaskOptions as MaskOptions
from patchkit.methods.desiderata_mask import learn_mask as learn_mask
from patchkit.methods.mask_scores import answers_with as answers_with
