"""What receivers make of a stream is what they make of it in a forward; a layer's attention alone; what is watched."""

from __future__ import annotations

import pytest
import torch

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import Site
from patchkit.tracing import capture
from patchkit.tracing.receivers import PROJECTIONS, read_by_attention, read_by_mlp, written_by_mlp
from patchkit.tracing.restart import Swap, compute_base, read_heads, run_watched
from tests import oracles
from tests.comparisons import PROMPTS, agree, pair


@pytest.mark.parametrize(
    "family",
    [
        *("llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap"),
        *("phi3-fused-gqa", "olmo2", "mixtral-experts"),
    ],
)
def test_a_stream_handed_over_is_read_as_in_a_forward(family: str) -> None:
    model, _ = pair(family, torch.float32)
    batch = Batch.from_ids(PROMPTS[2:], model.pad_id)
    middle = "resid_pre" if model.dims.parallel else "resid_mid"
    kinds = ("resid_pre", *PROJECTIONS.values(), middle, "mlp_in", "mlp_out")
    run = capture(model, batch, [Site(kind, layer) for kind in kinds for layer in range(3)]).values
    for layer in range(3):
        read = read_by_attention(model, layer, run[Site("resid_pre", layer)])
        for letter, kind in PROJECTIONS.items():
            agree(read[letter], run[Site(kind, layer)], f"{kind}.{layer}", 1e-5)
        stream = run[Site(middle, layer)]
        agree(read_by_mlp(model, layer, stream), run[Site("mlp_in", layer)], f"mlp_in.{layer}", 1e-5)
        agree(written_by_mlp(model, layer, stream), run[Site("mlp_out", layer)], f"mlp_out.{layer}", 1e-5)


def swap_of(family: str, kind: str, layer: int, start: int, head: int) -> tuple[Swap, torch.Tensor]:
    model, _ = pair(family, torch.float64)
    heads = model.dims.n_heads if kind == "q_proj" else model.dims.n_kv_heads
    generator = torch.Generator().manual_seed(5)
    values = torch.randn((2, 7, heads, model.dims.d_head), generator=generator, dtype=torch.float64)
    where = torch.zeros(2, 7, heads, dtype=torch.bool)
    where[:, start:, head] = True
    return Swap(Site(kind, layer), where, values), values


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2-post-norms-softcap", "olmo2"])
@pytest.mark.parametrize(("layer", "start"), [(0, 4), (1, 3), (2, 5)])
def test_one_layers_attention_and_what_is_watched(family: str, layer: int, start: int) -> None:
    model, twin = pair(family, torch.float64)
    prompts, padding = (PROMPTS[0], PROMPTS[1]), (0, 3)
    base = compute_base(model, Batch.from_ids(prompts, model.pad_id), behind_attention=[layer])
    rows = torch.tensor([1, 0])
    for kind in ("q_proj", "k_proj", "v_proj"):
        swap, values = swap_of(family, kind, layer, start, 1)
        heads = read_heads(model, base, rows, [swap], layer=layer, start=start)
        watched = [Site("attn_out", above) for above in range(layer, 3)] + [Site("resid_post", 2)]
        logits, seen = run_watched(model, base, rows, [swap], watched, layer=layer, start=start)
        for row, of in enumerate((1, 0)):

            def edit(value: torch.Tensor, new: torch.Tensor = values[of, start:]) -> torch.Tensor:
                value[-len(new) :, 1] = new[:, 1]
                return value

            expected = oracles.run(twin, prompts[of], {(kind, layer): edit})
            found = oracles.squeezed(expected.values)
            what = f"{kind} from column {start}, row {row}"
            agree(heads[row], found["z", layer][start - padding[of] :], f"z, {what}", 1e-6)
            agree(logits[row], expected.logits, f"logits, {what}", 1e-6)
            for site in watched:
                agree(seen[site][row], found[site.kind, site.layer][-1], f"{site}, {what}", 1e-6)


def test_watching_behind_an_attention() -> None:
    model, twin = pair("gpt2", torch.float64)
    base = compute_base(model, Batch.from_ids([PROMPTS[0]], model.pad_id), behind_attention=[1])
    values = torch.zeros(1, 7, model.dims.d_model, dtype=torch.float64)
    swap = Swap(Site("mlp_in", 1), torch.ones(1, 7, 1, dtype=torch.bool), values)
    watched = [Site("attn_out", 1), Site("attn_out", 2)]
    _, seen = run_watched(model, base, torch.tensor([0]), [swap], watched, layer=1, start=0)
    found = oracles.squeezed(oracles.run(twin, PROMPTS[0], {("mlp_in", 1): torch.zeros_like}).values)
    for site in watched:
        agree(seen[site][0], found["attn_out", site.layer][-1], str(site), 1e-10)


def test_a_restart_that_would_miss_a_swap_is_refused() -> None:
    model, _ = pair("gpt2", torch.float64)
    base = compute_base(model, Batch.from_ids(PROMPTS[:2], model.pad_id))
    swap, _ = swap_of("gpt2", "k_proj", 1, 4, 0)
    with pytest.raises(InputError, match="restarts at column 5 and would miss columns before it"):
        read_heads(model, base, torch.tensor([0, 1]), [swap], layer=1, start=5)
    with pytest.raises(InputError, match="the run restarts at layer 2 and would miss it"):
        run_watched(model, base, torch.tensor([0, 1]), [swap], [], layer=2, start=4)
