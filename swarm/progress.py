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
