"""Models: where each family keeps things, its sites, and how a model is opened."""

from patchkit.model.architectures import (
    Architecture as Architecture,
)
from patchkit.model.architectures import (
    architecture_for as architecture_for,
)
from patchkit.model.architectures import (
    families as families,
)
from patchkit.model.architectures import (
    register_architecture as register_architecture,
)
from patchkit.model.architectures import (
    unregister_architecture as unregister_architecture,
)
from patchkit.model.dims import Dims as Dims
from patchkit.model.edges import EdgeGraph as EdgeGraph
from patchkit.model.load import open_model as open_model
from patchkit.model.nodes import (
    NodeGrid as NodeGrid,
)
from patchkit.model.nodes import (
    kinds_of as kinds_of,
)
from patchkit.model.norms import Norm as Norm
from patchkit.model.patch_model import PatchModel as PatchModel
from patchkit.model.sites import (
    KINDS as KINDS,
)
from patchkit.model.sites import (
    NodeKind as NodeKind,
)
from patchkit.model.sites import (
    Site as Site,
)
from patchkit.model.sites import (
    check_site as check_site,
)
from patchkit.model.sites import (
    in_order as in_order,
)
from patchkit.model.sites import (
    node_name as node_name,
)
from patchkit.model.sites import (
    parse_node as parse_node,
)
from patchkit.model.sites import (
    sites_of as sites_of,
)
from patchkit.model.weights import Projection as Projection
