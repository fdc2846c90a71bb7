"""Which components a mask is over, and how one flat vector of mask values is laid out over sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import KINDS, Dims, Site, node_name, sites_of

#: Everyday names of component kinds, and the node kind each patches.
COMPONENT_KINDS = {"head": "z", "mlp": "mlp_out", "layer": "resid_post", "neuron": "neuron"}


@dataclass(frozen=True)
class Layout:
    """Components in one flat order: kind by kind, layer by layer.

    Attributes:
        kinds: the components' names as the user gave them, e.g. `head`, `mlp`.
        dims: the model's sizes.
    """

    kinds: tuple[str, ...]
    dims: Dims

    @classmethod
    def build(cls, components: Sequence[str], dims: Dims) -> Layout:
        """From `head`, `mlp`, `layer`, `neuron` or any node kind of the contract.

        Raises:
            InputError: an unknown kind, the same kind twice, none at all, or one this model does not have.
        """
        if not components:
            raise InputError(
                f"no components given; expected some of: {', '.join([*COMPONENT_KINDS, *KINDS])}"
            )
        for name in components:
            if COMPONENT_KINDS.get(name, name) not in KINDS:
                raise InputError(
                    f"component kind '{name}' is not known; expected one of: {', '.join([*COMPONENT_KINDS, *KINDS])}"
                )
        nodes = [COMPONENT_KINDS.get(name, name) for name in components]
        if len(set(nodes)) < len(nodes):
            raise InputError(f"components {', '.join(components)}: a kind is given twice")
        for node in nodes:
            sites_of(node, dims)
        return cls(tuple(components), dims)

    @property
    def node_kinds(self) -> list[str]:
        return [COMPONENT_KINDS.get(name, name) for name in self.kinds]

    @property
    def counts(self) -> list[int]:
        """Components per layer, by kind."""
        return [KINDS[kind].count(self.dims) for kind in self.node_kinds]

    @property
    def size(self) -> int:
        return self.dims.n_layers * sum(self.counts)

    @property
    def sites(self) -> list[Site]:
        return [site for kind in self.node_kinds for site in sites_of(kind, self.dims)]

    @property
    def names(self) -> list[str]:
        """The components' names, in flat order."""
        return [
            node_name(kind, layer, index)
            for kind, count in zip(self.node_kinds, self.counts, strict=True)
            for layer in range(self.dims.n_layers)
            for index in range(count)
        ]

    def by_kind(self, flat: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "layer node"]]:
        """Views of the flat vector, one a kind."""
        parts = flat.split([self.dims.n_layers * count for count in self.counts])
        return {
            name: part.view(self.dims.n_layers, count)
            for name, part, count in zip(self.kinds, parts, self.counts, strict=True)
        }

    def by_site(self, flat: Float[Tensor, " n"]) -> dict[Site, Float[Tensor, " node"]]:
        """Views of the flat vector, one a site."""
        rows = [row for part in self.by_kind(flat).values() for row in part.unbind(0)]
        return dict(zip(self.sites, rows, strict=True))

    def keep_all_but(self, patched: Sequence[int]) -> Float[Tensor, " n"]:
        """The mask that patches exactly these components: 0 there, 1 elsewhere."""
        keep = torch.ones(self.size)
        keep[torch.as_tensor(list(patched), dtype=torch.long)] = 0.0
        return keep
