"""Something that is tried again and again may fail for a long time: the log shall say so once, not each time."""

from __future__ import annotations

import logging
import time


class Outage:
    """Watches one thing that is tried again and again.

    what: that cannot be done, for the log: "announce this server".
    """

    def __init__(self, logger: logging.Logger, what: str):
        self._logger = logger
        self._what = what
        self._since: float | None = None

    def failed(self, error: Exception) -> None:
        """It failed. The first time in a row this is a warning that names the error."""
        if self._since is None:
            self._since = time.monotonic()
            self._logger.warning("could not %s, trying again until it works: %s", self._what, error)
        else:
            self._logger.debug("could not %s: %s", self._what, error)

    def worked(self) -> None:
        """It worked. After failures the log says that they are over."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._since = None
            self._logger.warning("can %s again, after %.0f s", self._what, seconds)
