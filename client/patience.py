"""How long a step may stay unanswered before we ask whether its server still lives."""

from __future__ import annotations

from .config import ClientConfig

#: A step that takes this many times as long as steps usually do is overdue.
OVERDUE = 3.0
#: Before the first step: as long as one takes on a slow computer.
FIRST = 1.0
#: Bytes/s of a slow line. A question after a large step waits until that went out.
SLOW_LINE = 3e6
#: Weight of the newest step in what is usual.
SMOOTHING = 0.2


class Patience:
    """Learns what a step of one session takes. To wait too short costs a ping; a server that answers it is kept.

    The usual time is that of single-token steps (of all rows at once); prompts are probed as often as those.
    """

    def __init__(self, config: ClientConfig):
        self.request_timeout = config.request_timeout
        self._hang_timeout = config.hang_timeout
        self._shortest, self._longest = config.min_patience, config.max_patience
        self._usual: float | None = None

    def learn(self, seconds: float) -> None:
        """A step of one token a row was done, undisturbed, in so many seconds."""
        self._usual = seconds if self._usual is None else self._usual + SMOOTHING * (seconds - self._usual)

    @property
    def before_probe(self) -> float:
        """Seconds without news after which a server is asked whether it lives."""
        usual = FIRST if self._usual is None else OVERDUE * self._usual
        return min(max(usual, self._shortest), self._longest)

    def hang_timeout(self, num_bytes: int) -> float:
        """Seconds for a server to show a sign of life while a step of so many bytes may be on its way."""
        return self._hang_timeout + num_bytes / SLOW_LINE
