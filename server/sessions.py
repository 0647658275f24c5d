"""The sessions that a server holds: who owns them, and which cache rows they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swarm.data_structures import BlockSpan
from swarm.errors import PeerRefused, ProtocolError, SessionLost, SessionTooLong
from swarm.protocol import OpenSession, Reorder, RowSlice, SessionPrompts, StepRequest

from .kv_cache import KVCache, RowCache
from .tasks import RowWork


class Session:
    """One session: rows of cache that belong to the peer that opened it.

    previous, next: where its steps may be pushed from besides its owner, and where its outputs are pushed to.
    last_step: number of the newest step that was accepted. An older one that arrives later is a late duplicate.
    """

    def __init__(self, request: OpenSession, owner: str, rows: list[RowCache]):
        self.session_id = request.session_id
        self.owner = owner
        self.previous = request.previous
        self.next = request.next
        self.output_codec = request.output_codec
        self.last_step = -1
        self.span: BlockSpan = request.span
        self.max_length = request.max_length
        self.rows = rows
        self._prompts: list[torch.Tensor] = []

    @property
    def evicted(self) -> bool:
        """Its cache was given to others."""
        return self.rows[0].session.evicted

    def check_alive(self) -> None:
        """Raises SessionLost if it was evicted."""
        if self.evicted:
            raise SessionLost(f"session {self.session_id} was evicted: others needed its cache; it can be replayed")

    def check_prompts(self, request: SessionPrompts, hidden_size: int) -> None:
        """Raises ProtocolError if these cannot be the next prompts of this session."""
        blocks, rest = divmod(request.prompts.shape[0], request.num_tokens)
        if rest or request.prompts.shape[1] != hidden_size or request.first + blocks > len(self.span):
            raise ProtocolError(
                f"prompts of shape {list(request.prompts.shape)} from block {request.first} on; this session of "
                f"{len(self.span)} blocks takes [blocks * {request.num_tokens}, {hidden_size}]"
            )
        if self.last_step >= 0:
            raise ProtocolError("prompts must come before the first step")
        if request.first != len(self._prompts) or (self._prompts and len(self._prompts[0]) != request.num_tokens):
            raise ProtocolError(
                f"prompts of {request.num_tokens} tokens from block {request.first} on after those of "
                f"{len(self._prompts)} blocks: they come in order, and are equally long"
            )

    def take_prompts(self, request: SessionPrompts, prompts: torch.Tensor) -> None:
        """prompts: [blocks * prompt tokens, hidden_size], on the device. Steps get them once all are here."""
        self._prompts += prompts.view(-1, request.num_tokens, prompts.shape[1])
        if len(self._prompts) == len(self.span):
            self.rows[0].session.prompts = torch.stack(self._prompts)
            self._prompts = list(self.rows[0].session.prompts)

    def check_step(self, request: StepRequest, hidden_size: int) -> list[RowWork]:
        """The work that a step asks for. Raises ProtocolError, or SessionTooLong naming what is wrong."""
        if 0 < len(self._prompts) < len(self.span):
            raise ProtocolError(
                f"a step after prompts for {len(self._prompts)} of the session's {len(self.span)} blocks"
            )
        shape = request.hidden.shape
        tokens = sum(row.num_tokens for row in request.rows)
        if len(shape) != 2 or shape[1] != hidden_size:
            raise ProtocolError(f"hidden states of shape {list(shape)}; this model takes [tokens, {hidden_size}]")
        if shape[0] != tokens:
            raise ProtocolError(f"hidden states for {shape[0]} tokens, but the rows list {tokens}")
        if len({row.row for row in request.rows}) != len(request.rows):
            raise ProtocolError("a step lists a row twice")
        lengths = self._lengths_after(request.reorder)
        if request.reorder is not None and len(request.rows) != len(self.rows):
            raise ProtocolError(f"a step that reorders {len(self.rows)} rows has tokens for {len(request.rows)} only")
        return [self._check_row(row, lengths) for row in request.rows]

    def _lengths_after(self, reorder: Reorder | None) -> list[int]:
        """Cached tokens of every row, once they are reordered as the step asks."""
        lengths = [row.length for row in self.rows]
        if reorder is None or reorder.number <= self.rows[0].session.reorder_number:
            return lengths
        if len(reorder.sources) != len(lengths) or max(reorder.sources) >= len(lengths):
            raise ProtocolError(f"a session of {len(lengths)} rows cannot be reordered as {list(reorder.sources)[:20]}")
        if any(
            self.rows[source].adapter is not row.adapter for source, row in zip(reorder.sources, self.rows, strict=True)
        ):
            raise ProtocolError("a row cannot become a copy of one with another adapter")
        return [lengths[source] for source in reorder.sources]

    def _check_row(self, row: RowSlice, lengths: Sequence[int]) -> RowWork:
        if row.row >= len(self.rows):
            raise ProtocolError(f"row {row.row} of a session with {len(self.rows)} rows")
        if row.num_tokens == 0:
            raise ProtocolError(f"row {row.row} has no tokens")
        if row.position > lengths[row.row]:
            raise ProtocolError(
                f"row {row.row} goes on at position {row.position}, but only {lengths[row.row]} tokens are cached here"
            )
        if row.position + row.num_tokens > self.max_length:
            raise SessionTooLong(
                f"{row.position} + {row.num_tokens} tokens are more than the session's max_length of {self.max_length}"
            )
        return RowWork(self.rows[row.row], row.position, row.num_tokens)


class SessionTable:
    """All sessions of a server. `on_change` is called when one opens or closes."""

    def __init__(self, cache: KVCache, on_change: Callable[[], None] = lambda: None):
        self._cache = cache
        self._sessions: dict[str, Session] = {}
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, request: OpenSession, owner: str) -> Session:
        """Admit a session. Raises CacheFull, or PeerRefused if its id is taken."""
        if request.session_id in self._sessions:
            raise PeerRefused(f"session {request.session_id} is open already")
        session = Session(request, owner, self._cache.admit(request.num_rows, request.max_length))
        self._sessions[request.session_id] = session
        self._on_change()
        return session

    def close(self, session: Session) -> None:
        """End a session and free its cache at once. Closing twice does no harm."""
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
            self._cache.release(session.rows)
            self._on_change()
