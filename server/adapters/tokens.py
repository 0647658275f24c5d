"""Which tokens of a flattened batch have which adapter, and where they stand in one grouped operation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

#: Consecutive tokens of a batch with one adapter: the adapter or None, and how many.
Run = tuple[Hashable | None, int]


@dataclass(frozen=True)
class Padded:
    """Members with few tokens each, side by side in one batched product [slots, width, features].

    tokens: int64 [n], in the flattened batch, in the order of their places. slots: int64, those that take part, None
    for the first `num_slots`. num_slots: how many that are. width: tokens of the member that has most. places: int64
    [n], in [num_slots * width]; None where these are all places in order.
    """

    tokens: torch.Tensor
    slots: torch.Tensor | None
    num_slots: int
    width: int
    places: torch.Tensor | None

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """[all tokens, features] -> [num_slots, width, features], zeros where no token stands."""
        own = rows.index_select(0, self.tokens)
        if self.places is not None:
            empty = own.new_zeros(self.num_slots * self.width, own.shape[1])
            own = empty.index_copy(0, self.places, own)
        return own.view(self.num_slots, self.width, -1)

    def take(self, padded: torch.Tensor) -> torch.Tensor:
        """[num_slots, width, features] -> [n, features]"""
        flat = padded.reshape(self.num_slots * self.width, -1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def of(self, pool: torch.Tensor) -> torch.Tensor:
        """The slots of a pool [slots, ...] that take part."""
        return pool[: self.num_slots] if self.slots is None else pool.index_select(0, self.slots)


@dataclass(frozen=True)
class Arrangement:
    """The tokens of a group's members. long: (slot, its tokens) of members with many, one product for each."""

    padded: Padded | None
    long: Sequence[tuple[int, slice | torch.Tensor]]


class TokenMap:
    """Who is in a flattened batch. Two with equal runs are interchangeable, so they are kept from step to step."""

    def __init__(self, runs: Sequence[Run], device: torch.device, most_padded: int):
        """most_padded: members with more tokens than this get a product of their own."""
        self.num_tokens = sum(count for _, count in runs)
        self._device = device
        self._most_padded = most_padded
        self._places: dict[Hashable, list[range]] = {}
        first = 0
        for adapter, count in runs:
            if adapter is not None:
                self._places.setdefault(adapter, []).append(range(first, first + count))
            first += count
        #: every adapter that some token has
        self.present: frozenset[Hashable] = frozenset(self._places)
        self._arrangements: dict[Hashable, Arrangement] = {}
        self._indices: dict[Hashable, torch.Tensor | int] = {}

    @cached_property
    def _sizes(self) -> dict[Hashable, int]:
        return {adapter: sum(map(len, ranges)) for adapter, ranges in self._places.items()}

    @torch.inference_mode(False)  # what is kept must serve passes with gradients as well
    def arrange(
        self, members: tuple[tuple[Hashable, int], ...], num_slots: int, *, gathers: bool = True
    ) -> Arrangement:
        """members: (adapter, slot) of those present, by slot. num_slots: how many of the group's pool are in use.

        gathers: a few slots can be taken out of the pool for a product; else few members get products of their own.
        """
        key = members, num_slots, gathers
        if key not in self._arrangements:
            short = [member for member in members if self._sizes[member[0]] <= self._most_padded]
            # to gather most of a pool costs more than to multiply all of it
            all_slots = 2 * len(short) >= num_slots
            if not all_slots and not gathers:
                short = []
            long = [(slot, self._where(adapter)) for adapter, slot in members if (adapter, slot) not in short]
            self._arrangements[key] = Arrangement(self._pad(short, num_slots, all_slots) if short else None, long)
        return self._arrangements[key]

    @torch.inference_mode(False)
    def slot_of_tokens(self, members: tuple[tuple[Hashable, int], ...]) -> torch.Tensor | int:
        """Of each token the slot, 0 where it has none, int64 [tokens]; one number if that is the same for all."""
        if members not in self._indices:
            slots = torch.zeros(self.num_tokens, dtype=torch.int64)
            for adapter, slot in members:
                for place in self._places[adapter]:
                    slots[place.start : place.stop] = slot
            first = int(slots[0])
            self._indices[members] = first if bool((slots == first).all()) else slots.to(self._device)
        return self._indices[members]

    def _where(self, adapter: Hashable) -> slice | torch.Tensor:
        ranges = self._places[adapter]
        if len(ranges) == 1:
            return slice(ranges[0].start, ranges[0].stop)
        return torch.cat([torch.arange(place.start, place.stop) for place in ranges]).to(self._device)

    def _pad(self, members: Sequence[tuple[Hashable, int]], num_slots: int, all_slots: bool) -> Padded:
        width = max(self._sizes[adapter] for adapter, _ in members)
        tokens, places = list[int](), list[int]()
        for number, (adapter, slot) in enumerate(members):
            own = [token for place in self._places[adapter] for token in place]
            tokens += own
            start = (slot if all_slots else number) * width
            places += range(start, start + len(own))
        num = num_slots if all_slots else len(members)
        slots = None if all_slots else self._tensor([slot for _, slot in members])
        exact = len(places) == num * width
        return Padded(self._tensor(tokens), slots, num, width, None if exact else self._tensor(places))

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
