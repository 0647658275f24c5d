"""Who is told how far the loading of a model is."""

from __future__ import annotations


class Progress:
    """This one keeps quiet; others say it to a person. Called from any thread, several times a second at most for each.

    What a method raises ends the loading.
    """

    def fetched(self, done: int, total: int) -> None:
        """done of total bytes that were missing here have come from the hub."""

    def loaded(self, done: int, total: int) -> None:
        """done of total blocks are in memory."""


QUIET = Progress()


class Stopped(Exception):
    """Whoever wanted the loading does not want it any more."""


class StoppableProgress(Progress):
    """Tells another one, until `stop` is called: then the loading ends where it is told of next."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def fetched(self, done: int, total: int) -> None:
        self._check()
        self._progress.fetched(done, total)

    def loaded(self, done: int, total: int) -> None:
        self._check()
        self._progress.loaded(done, total)

    def _check(self) -> None:
        if self._stopped:
            raise Stopped
