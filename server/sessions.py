"""The sessions that a server holds: who owns them, and which cache rows they have."""

from __future__ import annotations

from collections.abc import Callable

from swarm.data_structures import BlockSpan
from swarm.errors import NotSupported, PeerRefused, ProtocolError, SessionLost, SessionTooLong
from swarm.protocol import OpenSession, RowSlice, StepRequest, WorkKind

from .kv_cache import KVCache, RowCache
from .tasks import RowWork


class Session:
    """One session: rows of cache that belong to the peer that opened it."""

    def __init__(self, request: OpenSession, owner: str, rows: list[RowCache]):
        self.session_id = request.session_id
        self.owner = owner
        self.span: BlockSpan = request.span
        self.max_length = request.max_length
        self.rows = rows

    @property
    def evicted(self) -> bool:
        """Its cache was given to others."""
        return self.rows[0].session.evicted

    def check_step(self, request: StepRequest, hidden_size: int) -> list[RowWork]:
        """The work that a step asks for. Raises ProtocolError, SessionTooLong or NotSupported naming what is wrong."""
        if request.work is not WorkKind.INFERENCE:
            raise NotSupported(f"this server runs inference only, not {request.work.value} passes for training")
        shape = request.hidden.shape
        tokens = sum(row.num_tokens for row in request.rows)
        if len(shape) != 2 or shape[1] != hidden_size:
            raise ProtocolError(f"hidden states of shape {list(shape)}; this model takes [tokens, {hidden_size}]")
        if shape[0] != tokens:
            raise ProtocolError(f"hidden states for {shape[0]} tokens, but the rows list {tokens}")
        if len({row.row for row in request.rows}) != len(request.rows):
            raise ProtocolError("a step lists a row twice")
        return [self._check_row(row) for row in request.rows]

    def _check_row(self, row: RowSlice) -> RowWork:
        if row.row >= len(self.rows):
            raise ProtocolError(f"row {row.row} of a session with {len(self.rows)} rows")
        cache = self.rows[row.row]
        if row.num_tokens == 0:
            raise ProtocolError(f"row {row.row} has no tokens")
        if row.position > cache.length:
            raise ProtocolError(
                f"row {row.row} goes on at position {row.position}, but only {cache.length} tokens are cached here"
            )
        if row.position + row.num_tokens > self.max_length:
            raise SessionTooLong(
                f"{row.position} + {row.num_tokens} tokens are more than the session's max_length of {self.max_length}"
            )
        return RowWork(cache, row.position, row.num_tokens)


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

    def get(self, session_id: str, peer_id: str) -> Session:
        """The session, if it belongs to this peer. Raises SessionLost or PeerRefused."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionLost(f"no session {session_id} here: it was closed, or never opened")
        if session.owner != peer_id:
            raise PeerRefused(f"session {session_id} belongs to another peer")
        if session.evicted:
            raise SessionLost(f"session {session_id} was evicted: others needed its cache; it can be replayed")
        return session

    def close(self, session: Session) -> None:
        """End a session and free its cache at once. Closing twice does no harm."""
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
            self._cache.release(session.rows)
            self._on_change()
