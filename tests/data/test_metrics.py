"""Metrics against numbers worked out with the math module, and what a user's own metric may be."""

import math
import pickle

import pytest
import torch

from patchkit.data import (
    METRICS,
    accuracy,
    check_metric,
    kl,
    logit_diff,
    prob_diff,
    resolve_metric,
    target_logprob,
)
from patchkit.errors import InputError

LOGITS = torch.tensor([[1.0, 2.0, -0.5], [0.0, 3.0, 0.5]])
ANSWER, WRONG = torch.tensor([1, 2]), torch.tensor([0, 1])


def softmax(row):
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def test_values_and_signs():
    first, second = (softmax(row) for row in LOGITS.tolist())
    assert logit_diff(LOGITS, ANSWER, WRONG).tolist() == [1.0, -2.5]
    expected = [first[1] - first[0], second[2] - second[1]]
    assert prob_diff(LOGITS, ANSWER, WRONG).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [math.log(first[1]), math.log(second[2])]
    assert target_logprob(LOGITS, ANSWER).tolist() == pytest.approx(expected, abs=1e-6)
    assert accuracy(LOGITS, ANSWER).tolist() == [1.0, 0.0]


def test_kl_is_from_the_reference_and_not_negated():
    other = torch.tensor([[0.5, 0.0, 1.0], [0.0, 3.0, 0.5]])
    p, q = softmax(other[0].tolist()), softmax(LOGITS[0].tolist())
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    values = kl(LOGITS, reference=other)
    assert values[0].item() == pytest.approx(expected, abs=1e-6) and expected > 0.1
    assert values[1].item() == pytest.approx(0.0, abs=1e-7)


def test_half_precision_is_computed_in_float32():
    half = torch.tensor([[10.0, 10.0]], dtype=torch.bfloat16)
    value = target_logprob(half, torch.tensor([0]))
    assert value.dtype == torch.float32 and value.item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert logit_diff(LOGITS.double(), ANSWER, WRONG).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_named_metric_takes_the_same_call_and_pickles(name):
    metric = pickle.loads(pickle.dumps(resolve_metric(name)))
    values = metric(LOGITS, answer=ANSWER, wrong=WRONG, reference=LOGITS.flip(0))
    assert values.shape == (2,) and metric.name == name


def test_kl_without_a_reference_is_refused():
    with pytest.raises(InputError, match="needs the logits of a reference run"):
        resolve_metric("kl")(LOGITS, answer=ANSWER, wrong=WRONG)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_metric_module.py").write_text(
        "def margin(logits, answer):\n    return logits.gather(1, answer[:, None])[:, 0] - logits.mean(1)\n"
        "def averaged(logits, answer):\n    return logits.mean()\n"
        "def broken(logits, wrong):\n    return logits[:, 0] / 0 * 0\n"
        "def odd(logits, labels):\n    return logits[:, 0]\n"
        "number = 3\n"
    )
    (tmp_path / "own_metric_broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])


def test_a_metric_of_the_users(mine):
    values = resolve_metric("own_metric_module:margin")(LOGITS, answer=ANSWER, wrong=WRONG)
    assert values.tolist() == pytest.approx([2.0 - 2.5 / 3, 0.5 - 3.5 / 3], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logit_diff", "unknown metric 'logit_diff'; expected logit-diff, prob-diff"),
        ("own_metric_module:", "unknown metric"),
        ("no_such_module_here:f", "cannot be imported"),
        ("own_metric_broken:f", "cannot be imported"),
        ("own_metric_module:absent", "has no function 'absent'"),
        ("own_metric_module:number", "has no function 'number'"),
        ("own_metric_module:odd", r"found \(logits, labels\)"),
    ],
)
def test_metrics_that_cannot_be_used(mine, name, message):
    with pytest.raises(InputError, match=message):
        resolve_metric(name)


def test_results_that_cannot_be_used(mine):
    with pytest.raises(InputError, match=r"shape \[2\]; found torch.float32 \[\]; do not average"):
        resolve_metric("own_metric_module:averaged")(LOGITS, answer=ANSWER, wrong=WRONG)
    with pytest.raises(InputError, match="is nan in row 0"):
        resolve_metric("own_metric_module:broken")(LOGITS, answer=ANSWER, wrong=WRONG)
    with pytest.raises(InputError, match="found torch.int64"):
        check_metric(torch.tensor([1, 2]), 2)
    with pytest.raises(InputError, match="is inf in row 1"):
        check_metric(torch.tensor([1.0, math.inf]), 2)
