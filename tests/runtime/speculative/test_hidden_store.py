"""Hidden states that wait: found by position, zeros where unknown, copied together before there are too many tensors."""

from __future__ import annotations

import random

import torch
from camshaft.runtime.speculative.hidden_store import HiddenStore


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)


def make() -> HiddenStore:
    return HiddenStore(2, torch.float32, torch.device("cpu"))


def found(store: HiddenStore, *wanted: tuple[str, int, int]) -> list[int]:
    return store.gather(wanted)[:, 0].int().tolist()


def test_rows_are_found_by_position():
    store = make()
    store.add(rows(10, 11, 12, 20, 21), [("a", 4, range(3)), ("b", 0, (3, 4))])
    store.add(rows(13, 99, 22), [("a", 7, (0,)), ("b", 2, (2,))])
    assert (store.end("a"), store.end("b"), store.end("c"), store.num_rows) == (8, 3, 0, 7)
    assert found(store, ("b", -1, 4), ("a", 3, 6)) == [0, 20, 21, 22, 0, 10, 11, 12, 13, 0]
    assert found(store, ("c", 0, 2), ("a", 0, 2), ("a", 9, 1)) == [0, 0, 0, 0, 0]


def test_a_request_that_is_computed_again_replaces_its_rows():
    store = make()
    store.add(rows(10, 11), [("a", 4, range(2))])
    store.add(rows(12), [("a", 0, range(1))])
    assert found(store, ("a", 0, 6)) == [12, 0, 0, 0, 0, 0] and store.num_rows == 1


def test_rows_are_dropped():
    store = make()
    store.add(rows(1, 2, 3, 4), [("a", 0, range(4))])
    store.drop("a", 2)
    store.drop("a", 1)
    store.drop("c", 5)
    assert found(store, ("a", 0, 4)) == [0, 0, 3, 4] and store.num_rows == 2
    store.drop("a", 9)
    assert store.num_rows == 0 and store.end("a") == 4
    store.release("a")
    store.release("a")
    assert store.end("a") == 0


def test_many_steps():
    store, texts = make(), {name: 0 for name in "abc"}
    rng, value = random.Random(0), 0
    known: dict[tuple[str, int], int] = {}
    for _ in range(100):
        parts, items = [], []
        for name in texts:
            count = rng.randrange(3)
            items.append((name, texts[name], [len(parts) + i for i in range(count)]))
            for _ in range(count):
                value += 1
                parts.append(value)
                known[name, texts[name]] = value
                texts[name] += 1
        store.add(rows(*parts), items)
        name = rng.choice("abc")
        before = max(0, texts[name] - 4)
        store.drop(name, before)
        assert found(store, (name, before, 6)) == [known.get((name, before + i), 0) for i in range(6)]
    assert len(store._tensors) <= 17 and store._end < 200
