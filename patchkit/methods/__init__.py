"""The methods, one file each."""

from patchkit.methods._mask_objective import Objective as Objective
from patchkit.methods._mask_train import Schedule as Schedule
from patchkit.methods.desiderata_mask import MaskOptions as MaskOptions
from patchkit.methods.desiderata_mask import learn_mask as learn_mask
