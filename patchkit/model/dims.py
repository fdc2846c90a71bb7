"""The sizes of a model, read from its config and checked against its modules; no weights are needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from patchkit.errors import InputError
from patchkit.model.architectures import Architecture


@dataclass(frozen=True)
class Dims:
    """Sizes of a decoder.

    `d_mlp` is the number of neurons of one MLP, 0 where it cannot be split into neurons; `parallel`: attention and MLP
    side by side; `family`: the model's `config.model_type`, for messages.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab_size: int
    parallel: bool
    family: str = ""
    gated: bool = dataclasses.field(default=True, compare=False)
    eager: bool = dataclasses.field(default=False, compare=False)
    itemsize: int = dataclasses.field(default=4, compare=False)
    on_cpu: bool = dataclasses.field(default=False, compare=False)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    try:
        found = attrgetter(path)(root)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def input_width(module: nn.Module) -> int:
    """Columns a projection reads. HF's Conv1D (GPT-2) keeps its weight transposed.

    Raises:
        InputError: the module is not a projection.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise InputError(f"expected a projection with a weight matrix, found {type(module).__name__}")
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]


def check_paths(module: nn.Module, arch: Architecture) -> None:
    """Checks that every path of the table exists on the model and on each of its blocks.

    Raises:
        InputError: naming the field, the path that was looked for, and what is there instead.
    """
    for field, path in arch.model_paths().items():
        if find_module(module, path) is None:
            present = ", ".join(name for name, _ in module.named_modules() if name.count(".") <= 1 and name)[
                :400
            ]
            raise InputError(
                f"{type(module).__name__} (family '{arch.family}'): no module '{path}' for '{field}'. Found: {present}"
            )
    blocks = find_module(module, arch.layers)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise InputError(
            f"{type(module).__name__} (family '{arch.family}'): '{arch.layers}' should be a non-empty ModuleList, "
            f"found {type(blocks).__name__}"
        )
    embed = find_module(module, arch.embed)
    if not isinstance(embed, nn.Embedding):
        # Gradients start at its output.
        raise InputError(
            f"{type(module).__name__} (family '{arch.family}'): '{arch.embed}' should be the token embedding, an "
            f"nn.Embedding, found {type(embed).__name__}"
        )
    for index, block in enumerate(blocks):
        for field, path in arch.block_paths().items():
            if find_module(block, path) is None:
                present = ", ".join(name for name, _ in block.named_modules() if name)
                raise InputError(
                    f"{type(module).__name__} (family '{arch.family}'), layer {index}: no module '{path}' for "
                    f"'{field}'. Found: {present}. Register a corrected Architecture if this is a variant"
                )


def read_dims(module: nn.Module, config: Any, arch: Architecture) -> Dims:
    """The sizes of a model whose paths were checked; the config and the modules must agree.

    Raises:
        InputError: naming the two sizes that contradict each other.
    """
    n_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    d_model = int(config.hidden_size)
    blocks = find_module(module, arch.layers)
    assert isinstance(blocks, nn.ModuleList)
    width = _width_at(blocks[0], "out_proj", arch)
    d_mlp = 0 if arch.neurons is None else _width_at(blocks[0], "neurons", arch)
    d_head = int(getattr(config, "head_dim", None) or width // n_heads)
    if n_heads * d_head != width:
        raise InputError(
            f"{type(module).__name__}: '{arch.out_proj}' reads {width} columns, expected heads x d_head = "
            f"{n_heads} x {d_head} = {n_heads * d_head}"
        )
    if n_heads % n_kv_heads:
        raise InputError(f"{type(module).__name__}: {n_heads} heads do not divide into {n_kv_heads} KV heads")
    return Dims(
        n_layers=len(blocks),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_model=d_model,
        d_mlp=d_mlp,
        vocab_size=int(config.vocab_size),
        parallel=arch.is_parallel(config),
        family=arch.family,
        gated=_is_gated(blocks[0], arch),
        eager=getattr(config, "_attn_implementation", None) == "eager",
        itemsize=next(module.parameters()).element_size(),
        on_cpu=next(module.parameters()).device.type == "cpu",
    )


def _is_gated(block: nn.Module, arch: Architecture) -> bool:
    """Whether the MLP has a third projection beside those in and out, or one for both."""
    mlp = find_module(block, arch.mlp)
    assert mlp is not None
    return any("gate" in name for name, _ in mlp.named_modules())


def _width_at(block: nn.Module, field: str, arch: Architecture) -> int:
    module = find_module(block, arch.block_paths()[field])
    assert module is not None
    try:
        return input_width(module)
    except InputError as error:
        raise InputError(
            f"architecture '{arch.family}', {field}='{arch.block_paths()[field]}': {error}"
        ) from None
