"""The order of the adapters' operations: as written, or by FLOPs per byte."""

from __future__ import annotations

from swarm.server.adapters.operators import Work, in_order

WORKS = {"a": Work(10, 10), "b": Work(30, 10), "c": Work(10, 10), "d": Work(0, 0)}


def test_most_flops_per_byte_first() -> None:
    assert in_order(list("dabc"), "intensity", WORKS.__getitem__) == list("bacd")


def test_as_written() -> None:
    assert in_order(list("dabc"), "form", WORKS.__getitem__) == list("dabc")
