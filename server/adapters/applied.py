"""The adapters that the blocks of a span can apply, and which of them a batch needs.

Base and adapters meet here: one pass of the base over all tokens of a flattened batch, and beside each of its modules
one operation per form for all adapters in the batch (see `groups`). Rows without an adapter just have nothing added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .forms import AdapterForms, KeyValuePrefix
from .operators import Order, SideStreams
from .sites import ActiveBatch, Site, site_of
from .tokens import Run, TokenMap

if TYPE_CHECKING:
    from ..kv_cache import KVCache, RowCache

#: Adapters with more tokens than this in a batch get a product of their own. On a GPU launches cost more than padding.
MOST_PADDED = {"cpu": 4, "cuda": 64}
#: Batches whose arrangement is kept: decode steps of the same rows follow each other.
_NUM_MAPS = 32


class Adapter:
    """An adapter that is in the blocks. Compared by identity.

    prefix_row: where its prefix lies in the KV cache, if it has one. All its rows read it there, and nobody writes.
    """

    def __init__(self, forms: AdapterForms, prefix_row: RowCache | None = None):
        self.forms = forms
        self.prefix_row = prefix_row

    @property
    def prefix(self) -> KeyValuePrefix | None:
        return self.forms.prefix

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.forms.prefix is None else self.forms.prefix.num_tokens


class AppliedAdapters:
    """For one thread, the engine's, once that runs."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self._blocks = blocks
        self._device = device
        self._active = ActiveBatch()
        self._sites: dict[tuple[int, str, type], Site[Any]] = {}
        self._maps: dict[Sequence[Run], TokenMap] = {}
        self._adapters: set[Adapter] = set()

    @property
    def nbytes(self) -> int:
        """Bytes that the pools take beside the adapters themselves."""
        return sum(site.nbytes for site in self._sites.values())

    @property
    def order(self) -> Order:
        """Of the operations at each module."""
        return self._active.order

    @order.setter
    def order(self, order: Order) -> None:
        self._active.order = order
        for site in self._sites.values():
            site.plan_anew()

    @property
    def streams(self) -> bool:
        """Whether operations at linear layers run on streams of their own, beside the base's product; on a GPU only."""
        return self._active.streams is not None

    @streams.setter
    def streams(self, wanted: bool) -> None:
        if wanted and self._device.type != "cuda":
            raise ValueError(f"{self._device} has no streams")
        self._active.streams = SideStreams(self._device) if wanted else None

    def add(self, forms: AdapterForms, cache: KVCache | None = None) -> Adapter:
        """Put an adapter into the blocks; rows that name it get it from now on. Its forms must fit: importers check.

        cache: for its prefix; not needed for passes of whole rows. Raises CacheFull if a prefix finds no pages there.
        """
        row = None if forms.prefix is None or cache is None else _stored(forms.prefix, cache)
        adapter = Adapter(forms, row)
        for index, block in enumerate(forms.blocks):
            for parts in (block.bottlenecks, block.linear, block.norms):
                for path, form in parts.items():
                    key = index, path, type(form)
                    if key not in self._sites:
                        module = self._blocks[index].get_submodule(path)
                        self._sites[key] = site_of(module, form, self._active)
                    self._sites[key].add(adapter, form)
        self._adapters.add(adapter)
        return adapter

    def remove(self, adapter: Adapter, cache: KVCache | None = None) -> None:
        """No row may have it any more."""
        if adapter.prefix_row is not None and cache is not None:
            cache.release([adapter.prefix_row])
        self._adapters.discard(adapter)
        for key in list(self._sites):
            if self._sites[key].forget(adapter):
                self._sites.pop(key).restore()
        self._maps.clear()

    @contextlib.contextmanager
    def applied(self, runs: Sequence[Run]) -> Iterator[None]:
        """While blocks run a batch: which of its tokens have which adapter."""
        if not self._adapters or all(adapter is None for adapter, _ in runs):
            yield
            return
        self._active.tokens = self._map(runs)
        try:
            yield
        finally:
            self._active.tokens = None

    def _map(self, runs: Sequence[Run]) -> TokenMap:
        key = tuple(runs)
        found = self._maps.pop(key, None)
        if found is None:
            found = TokenMap(key, self._device, MOST_PADDED[self._device.type])
            if len(self._maps) >= _NUM_MAPS:
                self._maps.pop(next(iter(self._maps)))
        self._maps[key] = found
        return found


def _stored(prefix: KeyValuePrefix, cache: KVCache) -> RowCache:
    """Where a prefix lies from now on. Raises CacheFull."""
    (row,) = cache.admit(1, prefix.num_tokens, lasting=True)
    try:
        cache.grow(row, prefix.num_tokens)
        cache.write(row, prefix.keys, prefix.values)
    except BaseException:
        cache.release([row])
        raise
    return row
