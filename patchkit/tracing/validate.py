"""Validation on load: a tiny input shows that this model is read and written where the table says.

A wrong path, a wrong head order or a renamed module would otherwise give plausible, wrong numbers. The checks use the
model's own arithmetic: padding changes nothing, the residual stream adds up, the heads recompose to the attention's
output through W_O and the neurons to the MLP's, writing each kind of site changes what comes after it, and a run that
restarts in the middle ends like a whole one.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NoReturn

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.source import SourceNotAvailable
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site
from patchkit.tracing.capture import Captured, capture
from patchkit.tracing.patch import Patch, run_patched
from patchkit.tracing.restart import Swap, compute_base, run_swapped

#: For each kind, the next site of the layer that must change when it is written.
_SEEN_BY = {
    "resid_pre": "resid_post",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "q": "z",
    "k": "z",
    "v": "z",
    "z": "attn_out",
    "attn_out": "resid_post",
    "resid_mid": "resid_post",
    "mlp_in": "mlp_out",
    "neuron": "mlp_out",
    "mlp_out": "resid_post",
}
#: What nnsight and torch raise at a path that is something else, or that runs in another order than expected.
_UNREADABLE = (
    OutOfOrderError,
    SourceNotAvailable,
    RuntimeError,
    ValueError,
    AttributeError,
    TypeError,
    IndexError,
    KeyError,
)
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE = 5e-2


def available_kinds(model: PatchModel) -> list[str]:
    """The node kinds this model has, in execution order."""
    absent = {"resid_mid"} if model.dims.parallel else set()
    absent |= set() if model.dims.d_mlp else {"neuron"}
    return [kind for kind in KINDS if kind not in absent]


def validate(model: PatchModel) -> None:
    """Checks a freshly opened model on a tiny input; see the module's docstring.

    Raises:
        InputError: naming the model, the layer, the kind, and what did not agree.
    """
    with torch.no_grad():
        _validate(model)


def _validate(model: PatchModel) -> None:
    vocab = model.dims.vocab_size
    prompt = [int(i) % vocab for i in torch.linspace(1, vocab - 1, 8)]
    batch = Batch.from_ids([prompt[:6], prompt], pad_id=model.pad_id)
    kinds = available_kinds(model)
    layers = range(model.dims.n_layers)
    try:
        run = capture(model, batch, [Site(kind, layer) for kind in kinds for layer in layers])
        _check_shapes(model, run, batch)
        _check_padding(model, run, prompt[:6])
        for layer in layers:
            _check_residual(model, run, layer)
            _check_heads(model, run, layer)
            _check_neurons(model, run, layer)
        _check_writes(model, kinds, prompt)
        _check_restarts(model, prompt)
        for layer in layers:
            _check_readers(model, run, layer)
        _check_final_norm(model, run)
    except InputError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, OutOfOrderError):
            _refuse_silent_attention(model, batch)
        raise InputError(
            f"{model.name} (family '{model.arch.family}') could not be read by the architecture table: "
            f"{type(error).__name__}: {str(error).strip()[:500]}. Register a corrected Architecture, "
            "or load it with another attn_implementation"
        ) from error


def _refuse_silent_attention(model: PatchModel, batch: Batch) -> None:
    """Refuses a model of which all but the attention's arguments can be read: its attention calls no interface."""
    kinds = [kind for kind in available_kinds(model) if kind not in ("q", "k", "v")]
    try:
        capture(model, batch, [Site(kind, layer) for kind in kinds for layer in range(model.dims.n_layers)])
    except _UNREADABLE:
        return
    found = getattr(model.config, "_attn_implementation", None)
    other = "eager" if found == "sdpa" else "sdpa"
    raise InputError(
        f"{model.name} (family '{model.arch.family}'): q, k and v cannot be read under the attention implementation "
        f"'{found}', which here goes past the call that they are read at; load it with --attn-implementation {other} "
        f"(attn_implementation='{other}')"
    ) from None


def _agree(model: PatchModel, found: Tensor, expected: Tensor, what: str, normed: bool = False) -> None:
    """`normed`: one side went through a norm module, which many families compute in float32 whatever their dtype."""
    if found.shape != expected.shape:
        _refuse(model, f"{what} (shapes {tuple(found.shape)} and {tuple(expected.shape)})")
    found, expected = found.double(), expected.to(found.device).double()
    scale = float(expected.abs().max()) + 1e-6
    gap = float((found - expected).abs().max()) / scale
    limit = _TOLERANCE.get(torch.float32 if normed and model.dtype == torch.float64 else model.dtype, _COARSE)
    if not gap <= limit:
        _refuse(model, f"{what} (relative difference {gap:.2g}, allowed {limit:.0e})")


def _check_shapes(model: PatchModel, run: Captured, batch: Batch) -> None:
    for site, value in run.values.items():
        expected = (batch.rows, batch.width, *KINDS[site.kind].shape(model.dims))
        if tuple(value.shape) != expected:
            raise InputError(f"{model.name}: site {site} has shape {tuple(value.shape)}, expected {expected}")
    if not bool(torch.isfinite(run.logits).all()):
        raise InputError(
            f"{model.name} gives NaN or infinite logits on a tiny left-padded input; try another dtype or "
            "attn_implementation"
        )


def _check_padding(model: PatchModel, run: Captured, prompt: list[int]) -> None:
    ids = torch.tensor([prompt], device=model.embed_device)
    with torch.no_grad():
        plain = model.hf(input_ids=ids, use_cache=False).logits[:, -1]
    _agree(model, run.logits[:1], plain, "a left-padded prompt gives other logits than the same prompt alone")


def _check_residual(model: PatchModel, run: Captured, layer: int) -> None:
    def at(kind: str) -> Tensor:
        # Padding is left out: fully masked queries are undefined in some attention implementations.
        return run.values[Site(kind, layer)][1].to(model.embed_device)

    mid = at("resid_pre") + at("attn_out")
    if not model.dims.parallel:
        _agree(model, mid, at("resid_mid"), f"layer {layer}: resid_pre + attn_out is not resid_mid")
    _agree(
        model, mid + at("mlp_out"), at("resid_post"), f"layer {layer}: the residual stream does not add up"
    )


def _check_heads(model: PatchModel, run: Captured, layer: int) -> None:
    z, weight, bias = run.values[Site("z", layer)][1], model.w_o(layer), model.b_o(layer)
    out = torch.einsum("thd,hdm->tm", z, weight.to(z))
    if bias is not None:
        out = out + bias.to(z)
    if model.arch.attn_out is not None:
        with torch.no_grad():
            out = attrgetter(model.arch.attn_out)(model.block_module(layer))(out)
    _agree(
        model,
        out,
        run.values[Site("attn_out", layer)][1],
        f"layer {layer}: heads do not recompose to attn_out",
    )


def _check_neurons(model: PatchModel, run: Captured, layer: int) -> None:
    block = model.block_module(layer)
    if model.arch.neurons is None:
        return
    with torch.no_grad():
        out = attrgetter(model.arch.neurons)(block)(run.values[Site("neuron", layer)][1])
        if model.arch.mlp_out is not None and out.shape[-1] == model.dims.d_model:
            out = attrgetter(model.arch.mlp_out)(block)(out)
    _agree(
        model,
        out,
        run.values[Site("mlp_out", layer)][1],
        f"layer {layer}: neurons do not recompose to mlp_out",
    )


def _check_readers(model: PatchModel, run: Captured, layer: int) -> None:
    """Projections and the MLP's input recompose from the residual stream through the norms' arithmetic."""

    def at(kind: str) -> Tensor:
        return run.values[Site(kind, layer)][1]

    stream, norm = at("resid_pre"), model.attention_norm(layer)
    read = stream if norm is None else norm(stream)
    for kind, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), model.projections(layer), strict=True):
        made = torch.einsum("td,hdk->thk", read, weight.to(read))
        made = made if bias is None else made + bias.to(read)
        what = f"layer {layer}: {kind} is not the projection of the normed residual stream"
        _agree(model, made.to(at(kind).dtype), at(kind), what, normed=True)
    stream, norm = at("resid_pre" if model.dims.parallel else "resid_mid"), model.mlp_norm(layer)
    read = stream if norm is None else norm(stream).to(stream.dtype)
    what = f"layer {layer}: the MLP's input is not the normed residual stream"
    _agree(model, read, at("mlp_in"), what, normed=True)


def _check_final_norm(model: PatchModel, run: Captured) -> None:
    stream = run.values[Site("resid_post", model.dims.n_layers - 1)][1, -1:]
    module = attrgetter(model.arch.final_norm)(model.hf)
    with torch.no_grad():
        expected = module(stream)
    found = model.final_norm()(stream).to(stream.dtype)
    _agree(model, found, expected, "the final norm is not what its weights say", normed=True)


def _check_writes(model: PatchModel, kinds: list[str], prompt: list[int]) -> None:
    """One row a kind: written, it must change the site that reads it, and the rest must add up to it."""
    watched = [kind for kind in kinds if kind in _SEEN_BY]
    single = len(watched) + 1
    batch = Batch.from_ids([prompt] * (len(watched) + 2), pad_id=model.pad_id)
    layers = range(model.dims.n_layers)
    own = capture(model, batch, [Site(kind, layer) for kind in watched for layer in layers])
    generator = torch.Generator().manual_seed(0)

    def other(kind: str, layer: int) -> Tensor:
        value = own.values[Site(kind, layer)][:1]
        noise = torch.randn(value.shape, generator=generator).to(value)
        # Far from the run's own value on its own scale, so that even a saturated attention moves.
        return -value + noise * (value.abs().mean() + 1)

    def written(kind: str, layer: int) -> Patch:
        return Patch(Site(kind, layer), other(kind, layer), rows=torch.tensor([1 + watched.index(kind)]))

    patches = [written(kind, layer) for kind in watched for layer in layers]
    head = other("v_proj", 0)[:, :, 0]
    patches.append(Patch(Site("v_proj", 0), head, torch.tensor([single]), index=torch.tensor([0])))
    stream = [kind for kind in kinds if KINDS[kind].unit == "vector"]
    run = run_patched(
        model, batch, patches, read={Site(kind, layer) for kind in ("v", *stream) for layer in layers}
    )
    for row, kind in enumerate(watched, start=1):
        for layer in layers:
            _check_stream_after(model, run, layer, row, kind)
    values = run.values[Site("v", 0)]
    if not _moved(values[single, :, 0], values[0, :, 0]):
        _refuse(model, "writing one head of 'v_proj' leaves that head of 'v' as it is (is `packing` right?)")
    if model.dims.n_kv_heads > 1:
        what = "writing one head of 'v_proj' changes other heads of 'v' (is `packing` right?)"
        _agree(model, values[single, :, 1:], values[0, :, 1:], what)
    if model.dims.parallel:
        values = run.values[Site("mlp_out", 0)][[1 + watched.index("attn_out"), 0]]
        _agree(
            model,
            values[0],
            values[1],
            "blocks are called parallel, but the MLP reads the attention's output",
        )

    # One layer at a time, since all above a written one differ: the first will do, unless its attention is saturated.
    waiting = watched
    for layer in layers:
        read = {Site(_SEEN_BY[kind], layer) for kind in waiting}
        run = run_patched(model, batch, [written(kind, layer) for kind in waiting], read=read)
        seen = {kind: run.values[Site(_SEEN_BY[kind], layer)] for kind in waiting}
        waiting = [kind for kind in waiting if not _moved(seen[kind][1 + watched.index(kind)], seen[kind][0])]
        if not waiting:
            return
    _refuse(model, f"writing '{waiting[0]}' changes '{_SEEN_BY[waiting[0]]}' at no layer")


def _check_restarts(model: PatchModel, prompt: list[int]) -> None:
    """A run that restarts in the middle must end as one that does not: blocks may be skipped, keys reused, and the last
    layer run on the last token alone."""
    batch, last = Batch.from_ids([prompt], pad_id=model.pad_id), model.dims.n_layers - 1
    cases = [
        (Site(kind, layer), column) for kind in ("resid_pre", "z") for layer, column in ((0, 4), (last, 7))
    ]
    sites = [site for site, _ in cases]
    base = compute_base(model, batch, sites, behind_attention=sorted({0, last}))
    rows = torch.arange(len(cases))
    patches, restarted = [], []
    for row, (site, column) in enumerate(cases):
        values = -base.own[site]
        patches.append(Patch(site, values[:, column], rows[row : row + 1], torch.tensor([column])))
        where = torch.zeros(1, len(prompt), KINDS[site.kind].count(model.dims), dtype=torch.bool)
        where[:, column] = True
        swap = Swap(site, where, values)
        restarted.append(run_swapped(model, base, rows[:1], [swap], layer=site.layer, start=column))
    whole = run_patched(model, Batch.from_ids([prompt] * len(cases), pad_id=model.pad_id), patches).logits
    for row, (site, _) in enumerate(cases):
        what = f"a run that restarts at {site} ends differently from a whole one (does a block keep state?)"
        _agree(model, restarted[row][0], whole[row], what)


def _moved(found: Tensor, before: Tensor) -> bool:
    """Whether two activations differ by more than rounding."""
    gap, scale = (found - before).abs().max(), before.abs().max()
    return bool(gap > 8 * torch.finfo(before.dtype).eps * scale)


def _check_stream_after(model: PatchModel, run: Captured, layer: int, row: int, kind: str) -> None:
    """What is written must reach the skip connections too, not only the module that reads it."""

    def at(name: str) -> Tensor:
        return run.values[Site(name, layer)][row].to(model.embed_device)

    where = f"layer {layer}: after writing '{kind}' the residual stream does not add up"
    mid = at("resid_pre") + at("attn_out")
    if not model.dims.parallel:
        if kind != "resid_mid":
            _agree(model, mid, at("resid_mid"), where)
        mid = at("resid_mid")
    _agree(model, mid + at("mlp_out"), at("resid_post"), where)


def _refuse(model: PatchModel, what: str) -> NoReturn:
    raise InputError(
        f"{model.name} (family '{model.arch.family}') fails validation: {what}. The architecture table does not fit "
        "this model; register a corrected Architecture"
    )
