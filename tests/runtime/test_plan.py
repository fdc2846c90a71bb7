"""Plans by hand: forwards and operations, bytes and requests, how weights are spread, and times from a fake clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.data import Batch
from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost
from patchkit.runtime.batch_memory import Shape, batch_bytes, pass_bytes
from patchkit.runtime.plan import (
    PRICED,
    SENT_A_JOB,
    SENT_A_TOKEN,
    Plan,
    Stage,
    Steps,
    make_plan,
    price,
    token_flops,
)
from patchkit.runtime.plan_memory import Spread, Taken, spread_weights
from patchkit.runtime.plan_time import Pace, Rate, fit, measure, peak_rate, stage_seconds
from patchkit.runtime.plan_words import (
    Machine,
    count_words,
    fitting_tokens,
    flop_words,
    peaks,
    plan_lines,
    rate_lines,
    time_words,
)
from patchkit.tracing import capture
from tests.comparisons import pair

MICRO = Dims(n_layers=2, n_heads=2, n_kv_heads=1, d_head=3, d_model=5, d_mlp=7, vocab_size=11, parallel=False)


@dataclass(frozen=True)
class Forward:
    """A Program that runs prompts and gives nothing back; `kept` numbers a token stay, and it notes what it ran."""

    kept: int = 0
    seconds: Any = None

    def tokens(self, item: Sequence[int]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        if self.seconds is not None:
            self.seconds(sum(map(len, items)))
        return {}

    def cost(self, dims: Dims, items: Sequence[Sequence[int]]) -> Cost:
        tokens = sum(map(len, items))
        return Cost(2.0 * tokens, tokens * self.kept * dims.itemsize)


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    return [(1,) * length for length in lengths]


def plan_of(*stages: Stage, lengths: Sequence[int] = (4,)) -> Plan:
    return make_plan(MICRO, list(stages), lengths, max_batch_tokens=100, results=0.0)


def test_operations_of_a_token_by_hand() -> None:
    attention = 5 * (2 * 3) * 2 + 5 * (1 * 3) * 2
    mlp = 3 * 5 * 7
    scores_and_values = 2 * 8 * (2 * 3)
    by_hand = 2 * (2 * (attention + mlp + scores_and_values) + 5 * 11 / 8)
    assert token_flops(MICRO, 8.0) == by_hand


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_operations_of_a_forward_are_those_that_torch_counts(family: str) -> None:
    model, _ = pair(family)
    batch = Batch.from_ids(prompts(*[12] * 3), model.pad_id)
    capture(model, batch, [])
    with FlopCounterMode(display=False) as counter:
        capture(model, batch, [])
    # The CPU's attention kernel is none that torch counts; its two products are known.
    dims = model.dims
    counted = counter.get_total_flops()
    attention = 3 * 12 * dims.n_layers * 4 * 12 * dims.n_heads * dims.d_head
    known = any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
    assert 3 * 12 * token_flops(dims, 12.0) == pytest.approx(counted + attention * (not known), rel=1e-6)


def test_stages_by_hand() -> None:
    stage = Stage("run", Forward(kept=6), prompts(10, 20, 60, 30), back=8, back_of_batch=100, repeats=3.0)
    found = price(MICRO, stage, 100)
    # Batches of 10, 20 and 30 tokens, padded to 30, and of 60.
    assert (found.items, found.batches, found.widest) == (12.0, 6.0, 60)
    assert found.forwards == 3 * 2 * 120
    assert found.sent == 3 * (2 * SENT_A_JOB + 2 * SENT_A_TOKEN * (90 + 60))
    assert found.back == found.journal == 3 * (4 * 8 + 2 * 100)
    assert found.requests == 6
    assert found.taken.kept == 60 * 6 * 4
    assert found.taken.passes == max(
        pass_bytes(MICRO, Shape.of(each), backward=False) for each in ([60], [10, 20, 30])
    )


def test_open_batches_stay_and_steps_are_requests() -> None:
    steps = Steps(count=5, forwards=10.0, back=16)
    found = price(MICRO, Stage("train", Forward(kept=6), prompts(50, 50, 50), back=2, steps=steps), 100)
    assert found.forwards == 2 * 150 + 3 * 10
    assert found.taken.kept == 150 * 6 * 4, "all batches are open at once"
    assert found.requests == 2 + 5 * 2 and found.back == 3 * 2 + 5 * 2 * 16
    assert found.journal == 3 * 2, "steps are not journalled unless they say so"
    assert found.passes == 2 * 2 + 2 * 5 * 2


def test_many_batches_are_priced_by_some_of_them() -> None:
    found = price(MICRO, Stage("run", Forward(), prompts(*[7] * 20 * PRICED)), 7)
    assert found.batches == 20 * PRICED and found.forwards == pytest.approx(2 * 7 * 20 * PRICED)


def test_a_plan_adds_its_stages_up() -> None:
    one, two = Stage("a", Forward(kept=1), prompts(4)), Stage("b", Forward(kept=9), prompts(4, 4))
    made = plan_of(one, two, lengths=(4, 4))
    assert made.forwards == 2 * 12 and made.forward_equivalents == 3.0
    assert made.flops == 24 * token_flops(MICRO, 4.0)
    assert made.largest.label == "b" and made.summed("requests") == 2


def test_bytes_of_a_batch_are_those_of_its_parts() -> None:
    program, items = Forward(kept=3), prompts(8, 8)
    for itemsize in (2, 4):
        shape = Shape(2, 8, 8, masked=False)
        through = pass_bytes(Dims(**{**vars(MICRO), "itemsize": itemsize}), shape, backward=False)
        assert batch_bytes(program, MICRO, itemsize, items) == 16 * 3 * itemsize + through


def test_eager_attention_and_backwards_take_more() -> None:
    shape = Shape(4, 64, 64, masked=False)
    eager = Dims(**{**vars(MICRO), "eager": True})
    probabilities = 4 * 2 * 64 * 64 * 4
    assert pass_bytes(eager, shape, backward=False) >= 2 * probabilities, "masked scores, and their softmax"
    kept = pass_bytes(eager, shape, backward=True) - pass_bytes(MICRO, shape, backward=True)
    assert kept == 2 * probabilities, "of every layer"


def lazy() -> PatchModel:
    from patchkit.model.load import _wrap

    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    return _wrap(module, None, "made", None, borrowed=False, lazy=True)


def test_weights_are_spread_evenly_and_none_is_lost() -> None:
    model = lazy()
    held = [*model.hf.parameters(), *model.hf.buffers()]
    total = sum(each.numel() * 4 for each in held)
    assert spread_weights(model, 1).weights == (total,)
    layer = sum(parameter.numel() * 4 for parameter in model.block_module(0).parameters())
    for devices in (2, 3, 4):
        spread = spread_weights(model, devices)
        assert sum(spread.weights) == total and spread.devices == devices
        assert max(spread.weights) <= total / devices + 2 * layer


def test_the_peak_of_a_device() -> None:
    taken = Taken(1.0, kept=100, passes=30)
    assert Spread((1000,)).peak(taken) == 1130
    assert Spread((600, 400)).peak(taken) == 600 + 50 + 30


def test_what_fits_is_found_by_halving() -> None:
    stage = Stage("run", Forward(kept=1000), prompts(*[64] * 300))
    spread = Spread((1000,))
    whole = spread.peak(price(MICRO, stage, 16384).taken)
    half = spread.peak(price(MICRO, stage, 8192).taken)
    peak = peaks(MICRO, [stage], spread)
    assert fitting_tokens(peak, [stage], float(whole)) == 16384
    assert fitting_tokens(peak, [stage], float(half)) == 8192
    assert fitting_tokens(peak, [stage], 1001.0) is None


def test_fixed_and_each_from_two_batches() -> None:
    assert fit((10.0, 3.0), (40.0, 6.0)) == (2.0, 0.1)
    assert fit((10.0, 3.0), (40.0, 2.0)) == (0.0, 2.0 / 40.0), (
        "no slower with more tokens: all time is theirs"
    )
    assert fit((10.0, 1.0), (40.0, 8.0)) == (0.0, 0.2), "nothing left for the fixed part"


def test_the_time_of_a_stage_on_a_fake_clock() -> None:
    """Every batch takes 2 s, and half a second a token: the plan must find both."""
    now = [0.0]

    def took(tokens: int) -> None:
        now[0] += 2.0 + 0.5 * tokens

    stage = Stage("run", Forward(seconds=took), prompts(*[3] * 400))
    model, _ = pair("llama-gqa")
    pace, step = measure(model, stage, 30, clock=lambda: now[0])
    assert step is None and pace.fixed == pytest.approx(2.0) and pace.each == pytest.approx(0.25)
    # Two items take 5 s, and 15 are spent on the larger batch at the most.
    assert [count for count, _ in pace.measured] == [2, 6]
    plan = price(model.dims, stage, 30)
    assert stage_seconds(stage, plan, pace, step) == pytest.approx(40 * 2.0 + 0.5 * 1200)


@dataclass(frozen=True)
class Slow:
    """Opens batches in 1 s a token, on a fake clock."""

    now: list[float]

    def tokens(self, item: Sequence[int]) -> int:
        return len(item)

    def open(self, model: PatchModel, items: Sequence[Sequence[int]]) -> int:
        self.now[0] += float(sum(map(len, items)))
        return len(items)

    def cost(self, dims: Dims, items: Sequence[Sequence[int]]) -> Cost:
        return Cost(float(sum(map(len, items))))


@dataclass(frozen=True)
class Step:
    """3 s, and a tenth for each item."""

    now: list[float]

    def run(self, model: PatchModel, opened: int) -> dict[str, Tensor]:
        self.now[0] += 3.0 + 0.1 * opened
        return {}


def test_the_time_of_steps_on_a_fake_clock() -> None:
    now = [0.0]
    steps = Steps(count=7, forwards=14.0, back=0, example=(Step(now), 2.0))
    stage = Stage("train", Slow(now), prompts(*[4] * 8), steps=steps)
    model, _ = pair("llama-gqa")
    pace, step = measure(model, stage, 1000, clock=lambda: now[0])
    assert pace.each == pytest.approx(1.0) and step is not None
    assert (step.fixed, step.each) == (pytest.approx(3.0), pytest.approx(0.05))
    found = stage_seconds(stage, price(model.dims, stage, 1000), pace, step)
    assert found == pytest.approx(32 * 1.0 + 7 * 3.0 + 8 * 14 * 0.05)


def test_small_batches_wait_for_the_weights() -> None:
    made = plan_of(Stage("run", Forward(), prompts(4)))
    assert Rate(flops=made.flops / 3).seconds(made, 1000) == pytest.approx(3.0)
    # A forward and a backward of one batch read all weights twice.
    assert Rate(flops=1e30, bytes=500.0).seconds(made, 1000) == pytest.approx(4.0)


def test_rates_are_known_by_the_names_of_devices() -> None:
    h100 = peak_rate("NVIDIA H100 80GB HBM3", 2)
    assert h100 is not None and h100.flops == 989e12
    single = peak_rate("NVIDIA A100-SXM4-40GB", 4)
    assert single is not None and single.flops == 19.5e12
    assert peak_rate("AMD Instinct", 2) is None


def test_lines_say_what_is_a_rate_and_what_was_given() -> None:
    made = plan_of(Stage("run", Forward(), prompts(4)))
    spread = Spread((1000,))
    ((_, given),) = rate_lines(made, spread, Machine(rate=1e9), 2)
    assert "as given" in given
    known = rate_lines(made, spread, Machine(device="NVIDIA A100-SXM4-40GB", processes=8), 2)
    assert len(known) == 1 and "8 processes" in known[0][1] and "not a measurement" in known[0][1]
    assert len(rate_lines(made, spread, Machine(), 2)) == 2
    labels = dict(plan_lines(MICRO, made, [Stage("run", Forward(), prompts(4))], spread, Machine(memory=1e9)))
    assert labels["fits"] == "1 GB: 16,384 tokens a batch" and labels["if hosted"].startswith("1 job;")


def test_numbers_for_a_person() -> None:
    assert [count_words(each) for each in (7.0, 1234.0, 3.4e6, 13.02e9)] == ["7", "1.2k", "3.4M", "13.0B"]
    assert [flop_words(each) for each in (12.0, 2.5e12, 3e18)] == ["12 FLOP", "2.5 TFLOP", "3.0 EFLOP"]
    said = [time_words(each) for each in (0.44, 35.0, 119.0, 130.0, 7300.0, 90000.0, 300000.0)]
    assert said == ["0.4 s", "35 s", "119 s", "2.2 min", "2.0 h", "25 h", "3.5 days"]


def test_a_pace_is_linear() -> None:
    assert Pace(2.0, 0.5).seconds(3.0, 10.0) == 11.0
