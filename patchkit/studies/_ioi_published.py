"""What is published about GPT-2 small (Wang et al. 2022), beside our figures when the model is GPT-2 small, only then."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.model import PatchModel
from patchkit.results.evaluation import Evaluation
from patchkit.results.ioi import ProtocolScore, Rule

_SHAPE = (12, 12, 768, 50257)
_NAMES = ("gpt2", "openai-community/gpt2")
_HEADS = {
    "name mover": "9.9 10.0 9.6",
    "backup": "10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9",
    "negative name mover": "10.7 11.10",
    "S-inhibition": "7.3 7.9 8.6 8.10",
    "induction": "5.5 5.8 5.9 6.9",
    "duplicate token": "0.1 0.10 3.0",
    "previous token": "2.2 4.11",
}


def published_heads() -> dict[str, list[str]]:
    """The 26 heads of the published circuit, by class, as this package names heads."""
    return {
        name: [f"a{layer}.h{head}" for layer, head in (one.split(".") for one in heads.split())]
        for name, heads in _HEADS.items()
    }


def is_gpt2_small(model: PatchModel) -> bool:
    """Whether the published figures are about this model: its name on the hub, and its sizes."""
    dims = model.dims
    shape = (dims.n_layers, dims.n_heads, dims.d_model, dims.vocab_size)
    return model.name in _NAMES and model.arch.family == "gpt2" and shape == _SHAPE


def compare(
    model: PatchModel, rules: Sequence[Rule], evaluation: Evaluation, protocols: Sequence[ProtocolScore]
) -> dict[str, str]:
    """Published figure -> ours; empty for any other model than theirs."""
    if not is_gpt2_small(model):
        return {}
    ours = {rule.name: rule.heads for rule in rules}
    rows = {}
    for name, heads in published_heads().items():
        common = [head for head in heads if head in ours[name]]
        rows[f"{name} heads: {', '.join(heads)}"] = (
            f"{', '.join(ours[name]) or 'none'} ({len(common)} of the published {len(heads)})"
        )
    means = [
        one.faithfulness for one in protocols if one.template is not None and one.faithfulness is not None
    ]
    found = f"{sum(means) / len(means):.0%} (mean over {len(means)} templates)" if means else "not defined"
    rows["faithfulness 87 %, what is outside carrying the means of each template over ABC prompts"] = found
    repair = evaluation.repair
    if repair is not None and repair.clean:
        lost = 1 - repair.knocked_out / repair.clean
        rows["without the name movers the logit difference falls by 5 %"] = f"by {lost:.0%}"
    return rows
