"""Arithmetic of byte ranges, pure: what is missing, and in which requests to fetch it. A range is [start, end)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

ByteRange = tuple[int, int]


def union(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """The same bytes as few sorted ranges that neither overlap nor touch. Empty ranges are dropped."""
    merged: list[ByteRange] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def missing(wanted: Iterable[ByteRange], present: Iterable[ByteRange]) -> list[ByteRange]:
    """What of `wanted` is not in `present`, as `union` gives it."""
    left: list[ByteRange] = []
    have = union(present)
    for start, end in union(wanted):
        for there_start, there_end in have:
            if there_end <= start or end <= there_start:
                continue
            if start < there_start:
                left.append((start, there_start))
            start = there_end
            if start >= end:
                break
        if start < end:
            left.append((start, end))
    return left


def nbytes(ranges: Iterable[ByteRange]) -> int:
    """Bytes in ranges that do not overlap."""
    return sum(end - start for start, end in ranges)


def bridged(ranges: Sequence[ByteRange], slack: int) -> list[ByteRange]:
    """`ranges` (as `union` gives them) with their smallest gaps filled, for fewer requests.

    slack: most bytes of gaps that may be fetched for nothing.
    """
    gaps = sorted((after[0] - before[1], before[1]) for before, after in pairwise(ranges))
    filled = []
    for size, start in gaps:
        if size > slack:
            break
        slack -= size
        filled.append((start, start + size))
    return union([*ranges, *filled])


def cut(ranges: Iterable[ByteRange], size: int) -> list[ByteRange]:
    """The same ranges in order, in pieces of at most `size` bytes."""
    return [
        (piece, min(piece + size, end)) for start, end in ranges for piece in range(start, end, size) if start < end
    ]
