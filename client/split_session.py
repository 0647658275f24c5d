"""A session whose blocks are cut, for modules of the client or to see hidden states: one session for each part."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.protocol import RowAdapters
from swarm.routing.chain import Chain

from .cache import RemoteCache
from .failover import Replacement
from .inference_session import InferenceSession


class SplitSession:
    """Sessions of consecutive runs of blocks, used as one. A context manager.

    A step may fail between two of them; then those before have gone further. So the lengths that count are kept here,
    and every part is set back to them before a step.

    modules_after: blocks behind which modules of the client stood when it was opened.
    """

    def __init__(self, parts: Sequence[Session], modules_after: Sequence[int] = ()):
        self.parts: tuple[Session, ...] = tuple(parts)
        self.modules_after = tuple(modules_after)
        self.span: BlockSpan = BlockSpan(start=parts[0].span.start, end=parts[-1].span.end)
        self.num_rows: int = parts[0].num_rows
        self.max_length: int = parts[0].max_length
        self.lengths = [0] * self.num_rows
        self.cache = RemoteCache(self)

    @property
    def position(self) -> int:
        """Tokens in the cache, padding included. Set it to a smaller number to forget what comes after."""
        return self.cache.columns

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot set the position to {position}: the session holds {self.position} tokens")
        self.cache.crop(position - self.position)

    @property
    def chain(self) -> Chain:
        """The servers that hold this session, in order of their blocks. Empty before the first step."""
        return tuple(link for part in self.parts for link in part.chain)

    @property
    def replacements(self) -> list[Replacement]:
        """Every fail-over, in order of the blocks."""
        return [replacement for part in self.parts for replacement in part.replacements]

    @property
    def adapters(self) -> RowAdapters | None:
        """Of the rows, through all blocks."""
        return self.parts[0].adapters

    @property
    def deadline(self) -> float | None:
        """See `InferenceSession.deadline`."""
        return self.parts[0].deadline

    @deadline.setter
    def deadline(self, deadline: float | None) -> None:
        for part in self.parts:
            part.deadline = deadline

    def begin_step(self) -> None:
        """All parts as the last whole step left them."""
        for part in self.parts:
            part.rewind(self.lengths)
            part.cache.filled = self.cache.filled

    def end_step(self, num_tokens: int) -> None:
        """num_tokens: new columns of the whole, padding included."""
        self.lengths = list(self.parts[0].lengths)
        self.cache.filled += num_tokens

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row from `lengths[row]` on. Takes effect with the next step."""
        for part in self.parts:
            part.rewind(lengths)
        self.lengths = list(lengths)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes a copy of what row `sources[i]` is now. Done with the next step."""
        for part in self.parts:
            part.reorder(sources)
        self.lengths = [self.lengths[source] for source in sources]

    def close(self) -> None:
        """Give the servers their cache back. Closing twice does no harm."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> SplitSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


Session = InferenceSession | SplitSession
