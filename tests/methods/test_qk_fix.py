"""The QK fix: closed forms equal a triple loop to float64, hold in float32 where softmaxes saturate, and cost O(T^2)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchkit.methods._qk_fix import (
    attention_scores,
    key_effects,
    keys_together,
    probability_gradient,
    query_effects,
)
from patchkit.tracing.gradients import Attention
from tests.comparisons import agree


def seen_by(lengths: list[int], width: int, window: int | None = None) -> Tensor:
    """Which keys each query sees in a left-padded batch; a query always sees its own."""
    allowed = torch.zeros(len(lengths), width, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for query in range(width):
            for key in range(width):
                near = window is None or query - key < window
                real = key >= width - length
                allowed[row, query, key] = key == query or (key < query and near and real)
    return allowed


class Case:
    """Random queries, keys and gradients of two rows."""

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        scale: float = 1.0,
        softcap: float | None = None,
        window: int | None = None,
        lengths: tuple[int, ...] = (6, 4),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        width, size = max(lengths), 3

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rows = len(lengths)
        self.queries, self.patched_queries = (draw(rows, width, heads, size) * scale for _ in range(2))
        self.keys, self.patched_keys = (draw(rows, width, kv_heads, size) for _ in range(2))
        self.gradient = draw(rows, heads, width, width)
        self.attention = Attention(size**-0.5, softcap, seen_by(list(lengths), width, window))

    def pattern(self, row: int, head: int, query: int, new_query: Tensor, new_keys: Tensor) -> list[float]:
        """One softmax with plain floats; `new_keys` `[key, kv_head, size]`."""
        shared = head // (self.queries.shape[2] // self.keys.shape[2])
        scores = {}
        for key in range(new_keys.shape[0]):
            if self.attention.allowed[row, query, key]:
                score = float(new_query @ new_keys[key, shared]) * self.attention.scaling
                cap = self.attention.softcap
                scores[key] = score if cap is None else cap * math.tanh(score / cap)
        top = max(scores.values())
        total = sum(math.exp(score - top) for score in scores.values())
        return [
            math.exp(scores[key] - top) / total if key in scores else 0.0 for key in range(new_keys.shape[0])
        ]

    def moved(self, row: int, head: int, query: int, new_query: Tensor, new_keys: Tensor) -> float:
        """sum_j (p'_j - p_j) g_j."""
        before = self.pattern(row, head, query, self.queries[row, query, head], self.keys[row])
        after = self.pattern(row, head, query, new_query, new_keys)
        gradient = self.gradient[row, head, query].tolist()
        return math.fsum((a - b) * g for a, b, g in zip(after, before, gradient, strict=True))

    def query_loop(self) -> Tensor:
        rows, width, heads, _ = self.queries.shape
        found = torch.zeros(rows, width, heads, dtype=torch.float64)
        for row in range(rows):
            for query in range(width):
                for head in range(heads):
                    patched = self.patched_queries[row, query, head]
                    found[row, query, head] = self.moved(row, head, query, patched, self.keys[row])
        return found

    def with_keys(self, row: int, tokens: list[int]) -> Tensor:
        keys = self.keys[row].clone()
        for token in tokens:
            keys[token] = self.patched_keys[row, token]
        return keys

    def key_loop(self) -> Tensor:
        rows, width, heads, _ = self.queries.shape
        group = heads // self.keys.shape[2]
        found = torch.zeros(rows, width, self.keys.shape[2], dtype=torch.float64)
        for row in range(rows):
            for key in range(width):
                changed = self.with_keys(row, [key])
                for query in range(width):
                    for head in range(heads):
                        own = self.queries[row, query, head]
                        found[row, key, head // group] += self.moved(row, head, query, own, changed)
        return found


CASES = {
    "gqa": Case(),
    "mha": Case(kv_heads=4),
    "one kv head": Case(kv_heads=1),
    "soft-cap": Case(softcap=2.0, scale=3.0),
    "window": Case(window=3),
    "all of it": Case(softcap=1.5, window=2, lengths=(5, 3), scale=2.0),
    "peaked": Case(scale=20.0),
    "flat": Case(scale=0.01),
    "one key": Case(lengths=(1,)),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_forms_are_the_triple_loop(name: str) -> None:
    case = CASES[name]
    found = query_effects(case.patched_queries, case.queries, case.keys, case.attention)(case.gradient)
    agree(found, case.query_loop(), "queries", 1e-12)
    found = key_effects(case.patched_keys, case.queries, case.keys, case.attention)(case.gradient)
    agree(found, case.key_loop(), "keys", 1e-12)
    assert found.any() or name == "one key"


@pytest.mark.parametrize("name", ["gqa", "soft-cap", "window"])
def test_keys_of_several_tokens_at_once(name: str) -> None:
    case = CASES[name]
    width, kv_heads = case.keys.shape[1:3]
    tokens = [[1, 3, 4], [3]]
    where = torch.zeros(2, width, dtype=torch.bool)
    expected = torch.zeros(2, kv_heads, dtype=torch.float64)
    for row, members in enumerate(tokens):
        where[row, members] = True
        for head in range(4):
            for query in range(width):
                own = case.queries[row, query, head]
                expected[row, head // 2] += case.moved(row, head, query, own, case.with_keys(row, members))
    args = (case.patched_keys, case.queries, case.keys)
    found = keys_together(*args, where, case.attention)(case.gradient)
    agree(found, expected, "keys together", 1e-12)
    alone = key_effects(*args, case.attention)(case.gradient)
    agree(found[1], alone[1, 3], "one key together is one key", 1e-12)
    assert (found[0] - alone[0, tokens[0]].sum(0)).abs().max() > 1e-3, "several keys are no sum over tokens"


def test_all_keys_moved_alike_move_no_attention() -> None:
    case = Case(lengths=(6,))
    shifted = case.keys + torch.ones(3, dtype=torch.float64)
    where = torch.ones(1, 6, dtype=torch.bool)
    together = keys_together(shifted, case.queries, case.keys, where, case.attention)(case.gradient)
    agree(together, torch.zeros_like(together), "together", 1e-12)
    assert key_effects(shifted, case.queries, case.keys, case.attention)(case.gradient).abs().max() > 0.1


def test_the_probabilities_gradient_is_that_of_finite_differences() -> None:
    """J = f(p v): dJ/dp from dJ/dz, moving one probability at a time."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values, weights = draw(2, 5, 2, 3), draw(2, 5, 4, 3)
    pattern = draw(2, 4, 5, 5).softmax(-1)

    def metric(p: Tensor) -> Tensor:
        z = torch.stack(
            [torch.stack([p[row, h] @ values[row, :, h // 2] for h in range(4)], dim=1) for row in range(2)]
        )
        return (z * weights).sum().sin() + (z**2).sum()

    z = torch.einsum("bhit,bthd->bihd", pattern, values.repeat_interleave(2, dim=2)).requires_grad_(True)
    (z_gradient,) = torch.autograd.grad((z * weights).sum().sin() + (z**2).sum(), z)
    found = probability_gradient(z_gradient, values)
    step = 1e-6
    for row, head, query, key in ((0, 0, 0, 0), (0, 3, 4, 1), (1, 2, 2, 4), (1, 1, 3, 0)):
        nudge = torch.zeros_like(pattern)
        nudge[row, head, query, key] = step
        slope = (metric(pattern + nudge) - metric(pattern - nudge)) / (2 * step)
        assert float(found[row, head, query, key]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


# Saturated softmaxes in float32.


def closed_form(scores: Tensor, patched: Tensor, gradient: Tensor, attention: Attention) -> Tensor:
    """`key_effects` for one query at a time: `[batch, head, query, key]`.

    Query i is the i-th unit vector, so that the keys' entries are the scores themselves.
    """
    heads, width = scores.shape[1:3]
    queries = torch.eye(width, dtype=scores.dtype)[None, :, None].expand(len(scores), width, heads, width)
    keys, new = (each.permute(0, 3, 1, 2) for each in (scores, patched))
    effects = key_effects(new, queries, keys, attention)
    by_query = []
    for query in range(width):
        alone = torch.zeros_like(gradient)
        alone[:, :, query] = gradient[:, :, query]
        by_query.append(effects(alone).transpose(1, 2))
    return torch.stack(by_query, dim=2)


def naive(scores: Tensor, patched: Tensor, gradient: Tensor, attention: Attention) -> Tensor:
    """The closed form as it is written on paper: p' and 1 - p in the arithmetic of the scores."""
    change = patched - scores
    scores = scores.masked_fill(~attention.allowed[:, None], -torch.inf)
    p = scores.softmax(-1)
    raised = p * change.exp()
    after = raised / (raised + 1 - p)
    rest = ((p * gradient).sum(-1, keepdim=True) - p * gradient) / (1 - p)
    return (after - p) * (gradient - rest)


def by_loop(scores: Tensor, patched: Tensor, gradient: Tensor, attention: Attention) -> Tensor:
    """sum_j (p'_ij - p_ij) g_ij by a loop over keys in float64, every softmax a whole new one, summed without loss."""
    width = scores.shape[-1]
    found = torch.zeros(scores.shape, dtype=torch.float64)
    for row, head, query, key in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
        if not attention.allowed[row, query, key]:
            continue
        seen = [j for j in range(width) if attention.allowed[row, query, j]]
        own = [float(scores[row, head, query, j]) for j in seen]
        new = list(own)
        new[seen.index(key)] = float(patched[row, head, query, key])
        # Probabilities' changes add up to 0, so that of the largest need not be known: 1 - e^-30 has lost its digits.
        top = own.index(max(own))
        weights = [float(gradient[row, head, query, j]) for j in seen]
        patterns = []
        for values in (new, own):
            most = max(values)
            total = math.fsum(math.exp(value - most) for value in values)
            patterns.append([math.exp(value - most) / total for value in values])
        found[row, head, query, key] = math.fsum(
            (a - b) * (g - weights[top]) for a, b, g in zip(*patterns, weights, strict=True)
        )
    return found


def saturated(size: float, change: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Attention]:
    """Scores with one key of each row so far above the others, and the same after changes of about that size."""
    generator = torch.Generator().manual_seed(seed)
    width = 6
    scores = torch.randn(1, 2, width, width, generator=generator)
    winner = torch.randint(0, width, (1, 2, width, 1), generator=generator).minimum(
        torch.arange(width)[:, None]
    )
    scores = scores.scatter_add(-1, winner, torch.full(winner.shape, size))
    signs, noise = (torch.randn(scores.shape, generator=generator) for _ in range(2))
    gradient = torch.randn(scores.shape, generator=generator)
    return (
        scores,
        scores + signs.sign() * change + noise,
        gradient,
        Attention(1.0, None, seen_by([width], width)),
    )


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """Errors relative to each effect; effects below float32's smallest numbers are left out."""
    kept = expected.abs() > 1e-30
    return ((found.double() - expected).abs() / expected.abs())[kept].nan_to_num(torch.inf)


@pytest.mark.parametrize("size", [30.0, 60.0])
@pytest.mark.parametrize("change", [0.0, 3.0, 30.0, 100.0])
def test_saturated_rows_keep_their_digits_where_the_formula_on_paper_loses_them(
    size: float, change: float
) -> None:
    """1 - p is 0 in float32 from a lead of 17 on; the effect is e^-30 and has digits all the same."""
    for seed in range(3):
        case = saturated(size, change, seed)
        expected = by_loop(*case)
        # The scores themselves are rounded: 100 in float32 is off by 4e-6, and so is what they lead to.
        assert relative(closed_form(*case), expected).max() < 1e-4
        assert (relative(naive(*case), expected) > 0.5).double().mean() > 0.2, (
            "the naive formula has digits too"
        )


@pytest.mark.parametrize("size", [300.0, 3000.0])
@pytest.mark.parametrize("change", [1.0, 100.0, 300.0, 3000.0, 6000.0])
def test_rows_that_are_one_key_to_the_last_digit(size: float, change: float) -> None:
    """Nothing moves until the change is as large as the lead, and then everything does; nothing is NaN."""
    for seed in range(3):
        case = saturated(size, change, seed)
        found = closed_form(*case)
        assert bool(found.isfinite().all())
        # Where lead and change cancel, rounding 3000 to float32 (1e-4) is all that is lost.
        agree(found.double(), by_loop(*case), f"lead {size}, change {change}", 1e-3)
        assert bool((found.abs() > 0.1).any()) or change < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_changes_in_both_directions(dtype: torch.dtype) -> None:
    scores = torch.tensor([[[[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.2, -0.4, 0.1]]]], dtype=dtype)
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=dtype).expand(1, 1, 3, 3)
    attention = Attention(1.0, None, seen_by([3], 3))
    p = scores[0, 0, 2].double().softmax(-1)
    mean = float(p @ gradient[0, 0, 2].double())
    for change in (1e3, 1e30):
        up, down = (closed_form(scores, scores + d, gradient, attention)[0, 0, 2] for d in (change, -change))
        for key in range(3):
            g, rest = float(gradient[0, 0, 2, key]), 1 - float(p[key])
            # All attention on the key, or none.
            assert float(up[key]) == pytest.approx(g - mean, rel=1e-5)
            assert float(down[key]) == pytest.approx((mean - float(p[key]) * g) / rest - mean, rel=1e-5)


def test_a_query_that_sees_one_key_has_nothing_to_move() -> None:
    for score in (0.0, 3000.0, -3000.0):
        for change in (0.1, -5000.0, 5000.0):
            attention = Attention(1.0, None, torch.ones(1, 1, 1, dtype=torch.bool))
            one = torch.full((1, 1, 1, 1), score)
            assert not closed_form(one, one + change, one + 1, attention).any()
    # The same beside padding: the first real token sees itself alone, and padding tokens too.
    case = Case(lengths=(4, 1))
    effects = key_effects(case.patched_keys, case.queries, case.keys, case.attention)(case.gradient)
    assert not effects[1].any() and effects[0].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_small_changes_are_the_linear_estimate(softcap: float | None) -> None:
    """As D goes to 0 the fix is AtP: the gradient at the keys and queries times the change."""
    case = Case(softcap=softcap)
    mask = ~case.attention.allowed[:, None]
    queries, keys = (each.clone().requires_grad_(True) for each in (case.queries, case.keys))
    pattern = attention_scores(queries, keys, case.attention).masked_fill(mask, -torch.inf).softmax(-1)
    slopes = torch.autograd.grad((pattern * case.gradient).sum(), [queries, keys])
    for step in (1e-3, 1e-5):
        for name, own, other, slope in (
            ("query", case.queries, case.patched_queries, slopes[0]),
            ("key", case.keys, case.patched_keys, slopes[1]),
        ):
            patched = own + step * (other - own)
            effects = query_effects if name == "query" else key_effects
            found = effects(patched, case.queries, case.keys, case.attention)(case.gradient)
            linear = ((patched - own) * slope).sum(-1)
            gap = float((found - linear).abs().max() / linear.abs().max())
            assert gap < 3 * step, f"{name}, step {step}: {gap}"


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return made


@pytest.mark.parametrize("width", [16, 64])
def test_no_tensor_has_more_than_a_pattern_of_elements(width: int) -> None:
    """Batch x heads x T^2, of keys as of queries; one pattern for each patched key would be T times that."""
    case = Case(heads=2, kv_heads=1, lengths=(width,))
    for effects, patched in ((key_effects, case.patched_keys), (query_effects, case.patched_queries)):
        with Largest() as largest:
            effects(patched, case.queries, case.keys, case.attention)(case.gradient)
        assert largest.numel == 2 * width**2
