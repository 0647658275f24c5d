"""One operation for all adapters of a batch that have the same form at a module: their tensors lie in a pool.

A pool has a slot for every member that was in a batch lately. A member that joins is copied into a free slot, so a
batch in which adapters come and go costs the newcomers' tensors alone. Ranks are rounded up to a power of two with
zeros, so that adapters of different ranks share a product (PetS, Zhou et al., USENIX ATC'22, section 4.2, has one
launch for all tasks of a kind; here kinds of the same form share it as well).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from operator import itemgetter
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from .forms import Bottleneck, LowRank, Sparse
from .operators import Work
from .sparse_matrix import SparseMatrix
from .tokens import TokenMap

Form = TypeVar("Form")
Members = tuple[tuple[Hashable, int], ...]
#: Rows of a batch, and what an operation adds to them: [rows, out_features].
Product = tuple[slice | torch.Tensor, torch.Tensor]

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


#: A pool may have so many slots, or so many times those of a batch, before members that are idle make room for
#: newcomers: a larger pool saves copying them back and forth.
FEW = 8
IDLE_TO_NEEDED = 4


class Group(Generic[Form]):
    """The members of a form at one module. For one thread."""

    #: Slot of the first member: those before it mean nothing.
    first_slot = 0

    def __init__(self) -> None:
        self._slots: dict[Hashable, int] = {}  # least recently used first
        self.num_slots = 0
        self.num_changes = 0  # of who is in the pool
        self._lent = False  # a backward pass that is to come reads the pool as it is

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        raise NotImplementedError

    @torch.inference_mode(False)  # what is kept must serve passes with gradients as well
    def members(self, forms: Mapping[Hashable, Form]) -> Members:
        """Put all of `forms` into the pool: (adapter, slot) by slot. Good until the next call."""
        for adapter in forms:
            if adapter in self._slots:
                self._slots[adapter] = self._slots.pop(adapter)
        newcomers = [adapter for adapter in forms if adapter not in self._slots]
        if newcomers and self._lent:
            self._copy_pool()
            self._lent = False
        for adapter in newcomers:
            self.num_changes += 1
            self._changed()
            slot = self._free_slot(forms)
            self._put(slot, forms[adapter])
            self._slots[adapter] = slot  # now that it is there: memory may run out on the way
        return tuple(sorted(((adapter, self._slots[adapter]) for adapter in forms), key=itemgetter(1)))

    @property
    def used_slots(self) -> int:
        """Those behind them are free."""
        return max(self._slots.values(), default=-1) + 1

    def forget(self, adapter: Hashable) -> bool:
        """The adapter is gone; its slot is free. True if nobody is left."""
        self._slots.pop(adapter, None)
        return not self._slots

    def _free_slot(self, needed: Mapping[Hashable, Form]) -> int:
        taken = set(self._slots.values())
        for slot in range(self.first_slot, self.num_slots):
            if slot not in taken:
                return slot
        idle = [adapter for adapter in self._slots if adapter not in needed]
        if len(self._slots) >= max(FEW, IDLE_TO_NEEDED * len(needed)):
            return self._slots.pop(idle[0])
        first, num_slots = max(self.num_slots, self.first_slot), max(self.first_slot + 1, 2 * self.num_slots)
        self._grow(num_slots)
        self.num_slots = num_slots
        return first

    def _grow(self, num_slots: int) -> None:
        raise NotImplementedError

    def _put(self, slot: int, form: Form) -> None:
        raise NotImplementedError

    def _copy_pool(self) -> None:
        """What was lent keeps the old one."""

    def _lend(self) -> None:
        """The pool is about to be read, and where gradients are wanted, read once more by the backward pass."""
        self._lent = self._lent or torch.is_grad_enabled()

    def _changed(self) -> None:
        """A member comes in."""


def _grown(pool: torch.Tensor, num_slots: int) -> torch.Tensor:
    larger = pool.new_zeros(num_slots, *pool.shape[1:])
    larger[: len(pool)] = pool
    return larger


def rank_bucket(rank: int) -> int:
    """The next power of two."""
    return 1 << (rank - 1).bit_length()


class Products(Group[Form]):
    """Members whose operation adds to some rows."""

    @property
    def work(self) -> Work:
        """For one member with one token."""
        raise NotImplementedError

    def products(self, input: torch.Tensor, tokens: TokenMap, members: Members) -> Iterator[Product]:
        """input: [tokens, in_features]"""
        raise NotImplementedError

    def add_to(self, output: torch.Tensor, input: torch.Tensor, tokens: TokenMap, members: Members) -> torch.Tensor:
        """output: [tokens, out_features], changed where no gradients are wanted; input: [tokens, in_features]."""
        for where, rows in self.products(input, tokens, members):
            output = add_rows(output, where, rows)
        return output


class TwoProducts(Products[LowRank | Bottleneck]):
    """`up(activation(down x + down_bias)) + up_bias`, of rank `rank` or less."""

    def __init__(self, example: LowRank | Bottleneck):
        super().__init__()
        rank = rank_bucket(len(example.down))
        self.down = example.down.new_zeros(0, rank, example.down.shape[1])
        self.up = example.up.new_zeros(0, example.up.shape[0], rank)
        self._biases: tuple[torch.Tensor, torch.Tensor] | None = None
        self._activation = _ACTIVATIONS["identity"]
        if isinstance(example, Bottleneck):
            self._activation = _ACTIVATIONS[example.activation]
            self._biases = self.down.new_zeros(0, 1, rank), self.up.new_zeros(0, 1, self.up.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (self.down, self.up, *(self._biases or ())))

    def _grow(self, num_slots: int) -> None:
        self.down, self.up = _grown(self.down, num_slots), _grown(self.up, num_slots)
        if self._biases is not None:
            first, second = self._biases
            self._biases = _grown(first, num_slots), _grown(second, num_slots)

    def _copy_pool(self) -> None:
        self.down, self.up = self.down.clone(), self.up.clone()
        if self._biases is not None:
            first, second = self._biases
            self._biases = first.clone(), second.clone()

    def _put(self, slot: int, form: LowRank | Bottleneck) -> None:
        rank = len(form.down)
        for pool in (self.down, self.up, *(self._biases or ())):
            pool[slot] = 0
        self.down[slot, :rank] = form.down
        self.up[slot, :, :rank] = form.up
        if self._biases is not None and isinstance(form, Bottleneck):
            down_bias, up_bias = self._biases
            if form.down_bias is not None:
                down_bias[slot, 0, :rank] = form.down_bias
            if form.up_bias is not None:
                up_bias[slot, 0] = form.up_bias

    @property
    def work(self) -> Work:
        rank, in_features = self.down.shape[1:]
        numbers, moved = rank * (in_features + self.up.shape[1]), in_features + 2 * self.up.shape[1]
        return Work(2.0 * numbers, self.down.element_size() * (numbers + moved))

    def products(self, input: torch.Tensor, tokens: TokenMap, members: Members) -> Iterator[Product]:
        self._lend()
        arranged = tokens.arrange(members, self.used_slots)
        if (padded := arranged.padded) is not None:
            inner = torch.bmm(padded.put(input), padded.of(self.down).transpose(1, 2))
            if self._biases is not None:
                inner = self._activation(inner + padded.of(self._biases[0]))
            outer = torch.bmm(inner, padded.of(self.up).transpose(1, 2))
            if self._biases is not None:
                outer = outer + padded.of(self._biases[1])
            yield padded.tokens, padded.take(outer)
        for slot, where in arranged.long:
            inner = input[where] @ self.down[slot].t()
            if self._biases is not None:
                inner = self._activation(inner + self._biases[0][slot])
            outer = inner @ self.up[slot].t()
            if self._biases is not None:
                outer = outer + self._biases[1][slot]
            yield where, outer


class Vectors(Group[torch.Tensor]):
    """A vector for each token: its adapter's, or the neutral one."""

    first_slot = 1

    def __init__(self, neutral: torch.Tensor):
        """neutral: [features], what tokens without a member get."""
        super().__init__()
        self.num_slots = 1
        self._pool = neutral.clone()[None]

    @property
    def nbytes(self) -> int:
        return self._pool.nbytes

    def _grow(self, num_slots: int) -> None:
        self._pool = _grown(self._pool, num_slots)

    def _copy_pool(self) -> None:
        self._pool = self._pool.clone()

    def _put(self, slot: int, form: torch.Tensor) -> None:
        self._pool[slot] = form

    def of_tokens(self, tokens: TokenMap, members: Members) -> torch.Tensor:
        """[tokens, features], or [features] where all have the same."""
        self._lend()
        slots = tokens.slot_of_tokens(members)
        return self._pool[slots] if isinstance(slots, int) else self._pool.index_select(0, slots)


class SparseProducts(Products[Sparse]):
    """`S x` of every member, all of them as one block-diagonal sparse matrix where each has few tokens."""

    def __init__(self, example: Sparse):
        super().__init__()
        self._out, self._in = example.out_features, example.in_features
        self._forms: list[Sparse | None] = []
        self._matrices: list[SparseMatrix | None] = []
        self._together: SparseMatrix | None = None

    @property
    def nbytes(self) -> int:
        alone = sum(matrix.transposed_bytes for matrix in self._matrices if matrix is not None)
        return alone + (0 if self._together is None else self._together.nbytes)

    @property
    def work(self) -> Work:
        entries = [len(form.values) for form in self._forms if form is not None]
        mean = sum(entries) / max(1, len(entries))
        return Work(2.0 * mean, 8.0 * mean + 4.0 * (self._in + 2 * self._out))  # a value and a column each

    def _grow(self, num_slots: int) -> None:
        missing = num_slots - len(self._forms)
        self._forms += [None] * missing
        self._matrices += [None] * missing

    def _put(self, slot: int, form: Sparse) -> None:
        self._forms[slot] = form
        self._matrices[slot] = None

    def forget(self, adapter: Hashable) -> bool:
        if (slot := self._slots.get(adapter)) is not None:
            self._forms[slot] = self._matrices[slot] = None
            self._together = None
        return super().forget(adapter)

    def _changed(self) -> None:
        self._together = None

    def products(self, input: torch.Tensor, tokens: TokenMap, members: Members) -> Iterator[Product]:
        arranged = tokens.arrange(members, self.used_slots, gathers=False)
        if (padded := arranged.padded) is not None:
            if self._together is None:
                self._together = SparseMatrix(self._forms[: padded.num_slots], self._out, self._in)
            columns = padded.put(input).transpose(1, 2).reshape(-1, padded.width)
            product = self._together.product(columns).view(padded.num_slots, self._out, padded.width)
            yield padded.tokens, padded.take(product.transpose(1, 2))
        for slot, where in arranged.long:
            yield where, self._alone(slot).product(input[where].t()).t()

    def _alone(self, slot: int) -> SparseMatrix:
        matrix = self._matrices[slot]
        if matrix is None:
            matrix = self._matrices[slot] = SparseMatrix([self._forms[slot]], self._out, self._in)
        return matrix


def add_rows(output: torch.Tensor, where: slice | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`output` with `rows` added at these places; changed itself where no gradients are wanted."""
    if not torch.is_grad_enabled():
        if isinstance(where, slice):
            output[where] += rows
            return output
        return output.index_add_(0, where, rows)
    if isinstance(where, slice):
        where = torch.arange(where.start, where.stop, device=output.device)
    return output.index_add(0, where, rows)
