"""What the counter of live bytes sees: saved tensors, views, garbage."""

from __future__ import annotations

import torch

from tests.memory import LiveBytes

KB = 1024


def test_what_autograd_saves_is_alive_until_the_backward() -> None:
    given, weight = torch.randn(16, 16), torch.randn(16, 16, requires_grad=True)
    with LiveBytes() as held:
        product = given @ weight
        activated = product.sigmoid()
        del product
        assert held.live == KB, "a sigmoid saves what it gives, and a product its inputs, which were there"
        total = activated.exp().sum()
        del activated
        assert held.live == 2 * KB + 4, "what sigmoid and exp gave, though no name is left for either"
        total.backward()
        assert held.live == KB + 4, "the sum and the gradient"
    assert held.peak >= 3 * KB


def test_a_view_keeps_its_storage_and_counts_once() -> None:
    before = torch.zeros(256)
    with LiveBytes() as held:
        outside = before[:10]
        assert held.live == 0
        whole = torch.zeros(256)
        part = whole[:1]
        assert held.live == KB
        del whole
        assert held.live == KB
        del part, outside
        assert held.live == 0


def test_garbage_does_not_count_where_it_is_collected() -> None:
    def garbage() -> None:
        ring: list[object] = [torch.zeros(256)]
        ring.append(ring)

    with LiveBytes(collect=True) as held:
        for _ in range(5):
            garbage()
    assert held.peak == KB
