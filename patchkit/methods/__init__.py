"""The methods, one file each."""

from patchkit.methods._bounding import bound as bound
from patchkit.methods._mask_layout import Layout as Layout
from patchkit.methods._mask_objective import Objective as Objective
from patchkit.methods._mask_prepare import mask_cost as mask_cost
from patchkit.methods._mask_train import Schedule as Schedule
from patchkit.methods._node_options import ABLATIONS as ABLATIONS
from patchkit.methods._node_options import DIRECTIONS as DIRECTIONS
from patchkit.methods._node_options import NodeOptions as NodeOptions
from patchkit.methods.activation_patching import SetEffects as SetEffects
from patchkit.methods.activation_patching import patch_nodes as patch_nodes
from patchkit.methods.activation_patching import patch_sets as patch_sets
from patchkit.methods.attribution import METHODS as METHODS
from patchkit.methods.attribution import Method as Method
from patchkit.methods.attribution import attribute as attribute
from patchkit.methods.desiderata_mask import MaskOptions as MaskOptions
from patchkit.methods.desiderata_mask import learn_mask as learn_mask
from patchkit.methods.diagnostics import BoundOptions as BoundOptions
from patchkit.methods.mask_scores import answers_with as answers_with
from patchkit.methods.verification import verify as verify
