"""What makes a decoding step quick changes no value: the turned product, and keys and values that grow in place."""

from __future__ import annotations

from typing import Any

import pytest
import standins
import torch
from torch import nn
from transformers import DynamicCache

from adapterlab import linear
from adapterlab.kvcache import GrowingLayer, let_grow


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_choices", {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 300), (3, 1, 300), (2, 4, 300), (1, 1, 300)])
def test_all_products_give_what_the_layer_gives(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = nn.Linear(300, 400, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        with linear.few_rows(layer):
            found = [layer(x) for _ in range(3 * linear._TRIES + 1)]  # each product is tried, then one is chosen
    (choice,) = linear._choices.values()
    products = [linear.usual, linear.turned, linear.shared_out]
    assert {product: len(times) for product, times in choice.times.items()} == dict.fromkeys(products, linear._TRIES)
    assert 3 * linear._TRIES + 1 < linear._AGAIN
    assert choice.best in products
    for y in found:
        assert y.shape == expected.shape
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_quicker_product_is_chosen_and_a_bad_moment_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = 0.0, {linear.usual: 2.0, linear.turned: 9.0}  # the turned one's bad moment
    choice = linear.Choice([linear.usual, linear.turned])

    def clock() -> float:  # asked before and after each product, in turn
        nonlocal now
        asked = sum(map(len, choice.times.values()))
        product = [linear.usual, linear.turned][asked % 2]
        now += seconds[product] / 2  # half of it before, which no difference shows, and half after
        return now

    monkeypatch.setattr(linear.time, "perf_counter", lambda: clock() * 2)
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    for _ in range(2 * linear._TRIES):
        assert choice.best is None
        choice.try_next(x, weight, None)
    assert choice.best is linear.usual
    seconds[linear.turned] = 1.0
    for _ in range(2 * linear._KEPT):
        choice.try_next(x, weight, None)
    assert choice.best is linear.turned


def test_calls_are_timed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = nn.Linear(300, 400)
    first, more = 3 * linear._TRIES, 10
    with torch.no_grad(), linear.few_rows(layer):
        for _ in range(first + more * linear._AGAIN):
            layer(torch.randn(2, 300))
    (choice,) = linear._choices.values()
    assert first + more - 1 <= sum(map(len, choice.times.values())) <= first + more + 1


def test_a_weight_is_shared_out_only_where_that_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert linear.shared_out in linear.products_for(torch.randn(4, 3))
    assert linear.shared_out not in linear.products_for(torch.randn(5, 3))
    assert linear.shared_out not in linear.products_for(torch.randn(3, 4).T)


@pytest.mark.parametrize(
    ("dtype", "exchanged"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_in_half_precision_the_clock_has_no_say(dtype: torch.dtype, exchanged: bool) -> None:
    layer = nn.Linear(300, 400).to(dtype)
    with linear.few_rows(layer):
        assert ("forward" in layer.__dict__) is exchanged


def test_layers_are_afterwards_as_they_were_and_some_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(300, 400), nn.Linear(4, 4), Own(300, 400), nn.Linear(300, 400)])
    somebodys = lambda x: x  # noqa: E731
    model[3].forward = somebodys  # type: ignore[method-assign]

    def fail_inside() -> None:
        with linear.few_rows(model):
            assert ["forward" in layer.__dict__ for layer in model] == [True, False, False, True]
            assert model[3].forward is somebodys
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert ["forward" in layer.__dict__ for layer in model] == [False, False, False, True]


@pytest.mark.parametrize("most", [None, 6, 10, 16, 40])
def test_growing_layers_hold_what_transformers_own_hold(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterlab.kvcache._ROOM", 3)
    model = standins.tiny_llama().eval()
    ids = torch.randint(3, 60, (3, 5))
    plain, growing = DynamicCache(config=model.config), DynamicCache(config=model.config)
    let_grow(growing, most)
    assert all(type(layer) is GrowingLayer for layer in growing.layers)
    keep = {2: torch.tensor([0, 2]), 7: torch.tensor([1])}
    with torch.no_grad():
        for step in range(12):
            outputs: list[Any] = [model(ids, past_key_values=cache) for cache in (plain, growing)]
            torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=1e-6)
            ids = outputs[0].logits[:, -1:].argmax(-1)
            if step in keep:
                index = keep[step]
                plain.batch_select_indices(index)
                growing.batch_select_indices(index)
                ids = ids[index]
    for mine, theirs in zip(growing.layers, plain.layers):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    assert growing.get_seq_length() == plain.get_seq_length() == 16


def test_a_token_is_appended_without_copying_the_text() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 8))
    lying = layer.keys.data_ptr()
    for _ in range(100):
        keys, values = layer.update(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    assert keys.data_ptr() == lying
    assert keys.shape == values.shape == (2, 4, 110, 8)


def test_no_room_is_kept_beyond_the_end_of_the_text() -> None:
    layer = GrowingLayer(most=14)
    for new in (10, 1, 1, 1, 1):
        layer.update(torch.randn(2, 4, new, 8), torch.randn(2, 4, new, 8))
        assert layer.keys.untyped_storage().nbytes() == 2 * 4 * 14 * 8 * 4
    layer.update(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    assert layer.keys.shape == (2, 4, 15, 8), "whoever said 14 was wrong, and nothing is lost"


def test_a_cache_that_holds_text_or_is_of_another_kind_is_left_alone() -> None:
    from transformers import StaticCache

    model = standins.tiny_llama().eval()
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=used)
    before = list(used.layers)
    static = StaticCache(config=model.config, max_cache_len=8)
    for cache in (used, static, None):
        let_grow(cache)
    assert used.layers == before
    assert not any(isinstance(layer, GrowingLayer) for layer in static.layers)
