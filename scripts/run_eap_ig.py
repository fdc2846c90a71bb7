"""Run the EAP-IG repository beside on tiny random models and keep its numbers as a fixture of the tests.

    git clone https://github.com/hannamw/EAP-IG && git -C EAP-IG checkout 795f560
    pip install transformer-lens==3.9.0 matplotlib        # in an environment of its own
    python scripts/run_eap_ig.py --repo EAP-IG --out tests/fixtures/eap_ig

Nothing of the repository is changed on disk. At run time its literal `device='cuda'` is read as the CPU, and its
tokenizer is replaced by one that takes token ids, pads them on the right and adds no BOS. HookedTransformers get the
weights of the Hugging Face models as they are: nothing folded, nothing centred. It runs in float64: cutting an edge by
adding a difference to the full stream leaves rounding where the stream should be zero, which an RMSNorm enlarges.

Left out, since the repository computes something else than its name says:

- interventions `mean` (the last token divided by the length, then averaged over all nodes);
- `EAP-IG-activations` with the means (it interpolates towards zero);
- its JSON of scored nodes (cannot be written).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "795f560"
#: A prompt pair's token ids, answer and wrong answer.
Item = tuple[Sequence[int], Sequence[int], int, int]


class _OnThisMachine:
    """torch, with what is made on 'cuda' made on the CPU instead."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: str = "cpu", **options: Any) -> Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def tokens_of(model: Any, prompts: Sequence[Sequence[int]], max_length: int | None = None) -> tuple[Any, ...]:
    """In place of the repository's `tokenize_plus`: (ids padded on the right, mask, lengths, width)."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts])
    return ids, (torch.arange(width) < lengths[:, None]).long(), lengths, width


def import_repo(repo: Path) -> SimpleNamespace:
    """The repository's functions, made to run on token ids and on the CPU."""
    sys.path.insert(0, str(repo / "src"))
    modules = {
        name: importlib.import_module(f"eap.{name}") for name in ("attribute", "evaluate", "utils", "graph")
    }
    for module in (modules["attribute"], modules["evaluate"], modules["utils"]):
        for name, value in (("torch", _OnThisMachine()), ("tokenize_plus", tokens_of)):
            setattr(module, name, value)
    for name in ("utils", "evaluate"):
        setattr(modules[name], "tqdm", lambda batches, **_: batches)  # noqa: B010
    return SimpleNamespace(
        attribute=modules["attribute"].attribute,
        evaluate_graph=modules["evaluate"].evaluate_graph,
        evaluate_baseline=modules["evaluate"].evaluate_baseline,
        Graph=modules["graph"].Graph,
    )


def hooked(twin: PreTrainedModel, context: int) -> Any:
    """A HookedTransformer with a model's weights and dtype, queries, keys and values split as the repository needs it."""
    lens = importlib.import_module("transformer_lens")
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    given = twin.config
    shared = {
        "d_vocab": given.vocab_size,
        "n_layers": given.num_hidden_layers,
        "d_model": given.hidden_size,
        "n_heads": given.num_attention_heads,
        "n_ctx": context,
        "device": "cpu",
        "dtype": twin.dtype,
    }
    if given.model_type == "gpt2":
        special = {
            "d_head": given.n_embd // given.n_head,
            "d_mlp": 4 * given.n_embd,
            "eps": given.layer_norm_epsilon,
            "act_fn": given.activation_function,
            "normalization_type": "LN",
            "original_architecture": "GPT2LMHeadModel",
        }
        convert = conversions.convert_gpt2_weights
    else:
        grouped = given.num_key_value_heads != given.num_attention_heads
        special = {
            "d_head": given.head_dim,
            "d_mlp": given.intermediate_size,
            "eps": given.rms_norm_eps,
            "act_fn": given.hidden_act,
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "rotary_dim": given.head_dim,
            "rotary_base": int(given.rope_parameters["rope_theta"]),
            "final_rms": True,
            "gated_mlp": True,
            "n_key_value_heads": given.num_key_value_heads if grouped else None,
            "original_architecture": "LlamaForCausalLM",
        }
        convert = conversions.convert_llama_weights
    config = lens.HookedTransformerConfig(**shared, **special)
    model = lens.HookedTransformer(config, move_to_device=False)
    model.load_and_process_state_dict(
        convert(twin, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    config.use_split_qkv_input = config.use_attn_result = config.use_hook_mlp_in = True
    config.ungroup_grouped_query_attention = config.n_key_value_heads is not None
    return model.eval()


def batch_of(items: Sequence[Item]) -> list[tuple[Any, Any, Tensor]]:
    """A loader of one batch, as the repository takes it."""
    clean, corrupt, answer, wrong = zip(*items, strict=True)
    return [(list(clean), list(corrupt), torch.tensor([answer, wrong]).T)]


def logit_diff(logits: Tensor, _: Tensor | None, lengths: Tensor, label: Tensor) -> Tensor:
    """The metric of each prompt: logit of the answer less that of the wrong one, at the last real token."""
    last = logits[torch.arange(len(logits)), lengths - 1]
    values = last.gather(1, label)
    return values[:, 0] - values[:, 1]


def total(*given: Any) -> Tensor:
    """The metric summed over the batch, so that scores, which are divided by the number of prompts, are their mean."""
    return logit_diff(*given).sum()


#: (method, intervention): which are kept, of pairs of one length; those with a mean are not kept of the mixed ones.
RUNS = (
    ("EAP", "patching"),
    ("EAP", "zero"),
    ("EAP", "mean-positional"),
    ("EAP-IG-inputs", "patching"),
    ("EAP-IG-activations", "patching"),
    ("EAP-IG-activations", "zero"),
    ("clean-corrupted", "patching"),
    ("information-flow-routes", "patching"),
    ("exact", "patching"),
    ("exact", "zero"),
    ("exact", "mean-positional"),
)
#: (selection, by |score|, edges): circuits chosen from EAP's scores, negated so that higher = helps, and pruned.
CIRCUITS = (
    ("top", True, 60),
    ("top", False, 60),
    ("top", True, 160),
    ("greedy", True, 60),
    ("greedy", False, 90),
)
INTERVENTIONS = ("patching", "zero", "mean-positional")


class Runner:
    """One model and one set of prompt pairs."""

    def __init__(self, repo: SimpleNamespace, model: Any, items: Sequence[Item], steps: int) -> None:
        self.repo, self.model, self.steps, self.loader = repo, model, steps, batch_of(items)
        # Means are over the corrupted prompts, which is what stands in where an edge is cut.
        self.reference = [self.loader[0][1]]

    def scores(self, method: str, intervention: str) -> Tensor:
        graph = self.repo.Graph.from_model(self.model)
        self.repo.attribute(
            self.model,
            graph,
            self.loader,
            # `exact` takes a mean over prompts itself, and so wants the metric of each.
            logit_diff if method == "exact" else total,
            method,
            intervention=intervention,
            ig_steps=self.steps,
            intervention_dataloader=self.reference if "mean" in intervention else None,
            quiet=True,
        )
        self.model.zero_grad()
        scores = graph.scores.clone()
        scores[~graph.real_edge_mask] = torch.nan
        if scores[graph.real_edge_mask].isnan().any():
            raise SystemExit(f"{method} {intervention}: some scores are NaN")
        return scores

    def circuit(self, scores: Tensor, selection: str, absolute: bool, n: int) -> Tensor:
        """A circuit of the repository's own selection, pruned."""
        graph = self.repo.Graph.from_model(self.model)
        importance = -scores
        graph.scores[:] = importance
        keys = (
            (importance.abs() if absolute else importance)[graph.real_edge_mask].sort(descending=True).values
        )
        if not keys[n - 1] - keys[n] > 1e-6 * keys[0] or keys[n] <= (0.0 if absolute else -torch.inf):
            raise SystemExit(
                f"{selection} {n}: edges {n} and {n + 1} have the same score; take another number"
            )
        apply = graph.apply_topn if selection == "top" else graph.apply_greedy
        apply(n, absolute=absolute, prune=True)
        return graph.in_graph.clone()

    def shared(self, groups: int) -> Tensor:
        """Random edges, the same for all query heads that share a key or value, of which none is a dead end."""
        heads, draw = self.model.cfg.n_heads, torch.Generator().manual_seed(0)
        while True:
            graph = self.repo.Graph.from_model(self.model)
            mask = graph.real_edge_mask & (torch.rand(graph.in_graph.shape, generator=draw) < 0.6)
            for layer in range(self.model.cfg.n_layers):
                first = layer * (3 * heads + 1) + heads
                shared = mask[:, first : first + 2 * heads].unflatten(1, (2, groups, heads // groups))
                mask[:, first : first + 2 * heads] = shared[..., :1].expand_as(shared).flatten(1)
            graph.in_graph[:] = mask
            graph.prune()
            if torch.equal(graph.in_graph, mask):
                return mask

    def evaluate(self, circuit: Tensor, intervention: str) -> Tensor:
        """The metric of each prompt, all edges outside the circuit cut."""
        graph = self.repo.Graph.from_model(self.model)
        graph.in_graph[:] = circuit
        return self.repo.evaluate_graph(
            self.model,
            graph,
            self.loader,
            logit_diff,
            quiet=True,
            intervention=intervention,
            intervention_dataloader=self.reference if "mean" in intervention else None,
        )

    def run(self, one_length: bool, groups: int, note: Callable[[str], None]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for method, intervention in RUNS:
            if one_length or intervention != "mean-positional":
                note(f"{method} {intervention}")
                found[f"{method}/{intervention}"] = self.scores(method, intervention)
        circuits = {
            f"{selection}-{'absolute' if absolute else 'signed'}-{n}": self.circuit(
                found["EAP/patching"], selection, absolute, n
            )
            for selection, absolute, n in CIRCUITS
        }
        circuits["random"] = self.shared(groups)
        for name, circuit in circuits.items():
            found[f"circuit/{name}"] = circuit
            for intervention in INTERVENTIONS:
                if one_length or intervention != "mean-positional":
                    found[f"evaluate/{name}/{intervention}"] = self.evaluate(circuit, intervention)
        for name, corrupted in (("clean", False), ("corrupted", True)):
            found[f"baseline/{name}"] = self.repo.evaluate_baseline(
                self.model, self.loader, logit_diff, run_corrupted=corrupted, quiet=True
            )
        return found


CONVENTIONS = {
    "repository": f"hannamw/EAP-IG at {COMMIT}",
    "scores": "[senders, receivers] by query head, NaN where there is no edge; mean over the prompts of the set",
    "precision": "run in float64, kept as float32",
    "sign": "metric with the edge cut less metric without: a helping edge is negative. Information-flow routes have none",
    "metric": "logit of the answer less logit of the wrong one at the last token, plain, summed over the batch",
    "senders": "input (token embedding), then of each layer its heads (after W_O, without its bias) and its MLP",
    "receivers": "of each layer all queries, all keys, all values, the MLP; the logits last",
    "prompts": "one batch, padded on the right, no BOS; tests/methods/peer_cases.py",
    "means": "over the corrupted prompts of the set, position by position",
    "circuits": "selected from EAP/patching times -1 (higher = helps), pruned; random: equal for heads sharing a KV head",
    "evaluate": "metric of each prompt with every edge outside the circuit cut",
    "EAP-IG-activations": "on rotary models without the gradients at layer 0's queries, keys and values in the runs "
    "whose input is interpolated (a defect): input->a0 edges cannot be compared",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help=f"a clone of hannamw/EAP-IG at {COMMIT}")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    cases = importlib.import_module("tests.methods.peer_cases")
    commit = subprocess.run(
        ["git", "-C", str(options.repo), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not commit.startswith(COMMIT):
        raise SystemExit(f"{options.repo} is at {commit[:7]}; expected {COMMIT}")
    torch.set_num_threads(1)
    repo = import_repo(options.repo)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {}
    for family in cases.FAMILIES:
        twin = cases.build(family)
        weights[family] = cases.fingerprint(twin)
        model = hooked(twin.double(), context=64)
        groups = twin.config.to_dict().get("num_key_value_heads", twin.config.num_attention_heads)
        found: dict[str, Tensor] = {}
        for name, items in cases.SETS.items():
            runner = Runner(repo, model, items, cases.STEPS)
            one_length = len({len(item.clean) for item in items}) == 1
            numbers = runner.run(one_length, groups, lambda what, at=f"{family} {name}": print(at, what))
            for key, value in numbers.items():
                found[f"{name}/{key}"] = value.contiguous() if value.dtype == torch.bool else value.float()
        save_file(found, options.out / f"{family}.safetensors")
    made = {
        **CONVENTIONS,
        "steps": cases.STEPS,
        "command": f"python scripts/run_eap_ig.py --repo EAP-IG --out {options.out}",
        "versions": {
            "torch": torch.__version__,
            "transformer-lens": importlib.metadata.version("transformer-lens"),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "weights": weights,
    }
    (options.out / cases.CONVENTIONS.name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
