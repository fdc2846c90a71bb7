"""Models: where each family keeps things, its sites, and how a model is opened."""

from patchkit.model.architectures import (
    Architecture as Architecture,
    architecture_for as architecture_for,
    families as families,
    register_architecture as register_architecture,
    unregister_architecture as unregister_architecture,
)
from patchkit.model.dims import Dims as Dims
from patchkit.model.load import open_model as open_model
from patchkit.model.patch_model import PatchModel as PatchModel
from patchkit.model.sites import (
    KINDS as KINDS,
    NodeKind as NodeKind,
    Site as Site,
    check_site as check_site,
    in_order as in_order,
    node_name as node_name,
    parse_node as parse_node,
    sites_of as sites_of,
)
