"""Which adapters the rows of a call have: that of the model, that of the call, or one for each row.

Names are the user's; a name becomes an `AdapterRef`, a name with a digest, when servers are asked for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from swarm.data_structures import MAX_ADAPTER_NAME, AdapterRef, BlockSpan, is_adapter_name
from swarm.errors import UsageError
from swarm.protocol import RowAdapters, row_adapters

#: What peft calls a row without an adapter; None says the same.
BASE = "__base__"


class NotGiven(Enum):
    """None is a choice: no adapter."""

    NOT_GIVEN = "not given"


NOT_GIVEN = NotGiven.NOT_GIVEN

#: One adapter for all rows, or one for each; None is no adapter.
Choice: TypeAlias = str | tuple[str | None, ...] | None
#: The adapters of a session's or a pass's rows, in their order.
Refs: TypeAlias = tuple[AdapterRef | None, ...]


def read_choice(active_adapter: Any = NOT_GIVEN, adapter_names: Any = None) -> Choice | NotGiven:
    """What the keywords of a call say. Raises UsageError for what cannot name adapters."""
    if adapter_names is None:
        if isinstance(active_adapter, list | tuple):
            raise UsageError("active_adapter is one name for all rows; adapter_names takes one for each row")
        return active_adapter if active_adapter is NOT_GIVEN else _name(active_adapter)
    if active_adapter is not NOT_GIVEN:
        raise UsageError("give either active_adapter, for all rows, or adapter_names, one for each row")
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise UsageError(
            f"adapter_names must be a list with one name (or None) for each row, not {adapter_names!r:.100}"
        )
    return tuple(map(_name, adapter_names))


def _name(name: Any) -> str | None:
    if name is None or name == BASE:
        return None
    if not isinstance(name, str) or not is_adapter_name(name):
        raise UsageError(
            f"{name!r:.100} cannot be the name of an adapter: names have 1 to {MAX_ADAPTER_NAME} visible ASCII "
            "characters, no spaces"
        )
    return name


@dataclass
class _Call:
    """copies: rows that `generate` makes of each row of its input, one after another."""

    choice: Choice
    copies: int = 1


class Adapters:
    """The adapters of one model. default: that of rows of which nothing else is said, in every thread.

    find: gives the adapter of a name that the servers of a span have. Raises AdapterNotServed.
    """

    def __init__(self, find: Callable[[str, BlockSpan], AdapterRef]):
        self.default: str | None = None
        self._find = find
        self._calls = threading.local()  # `_calls.current`: what the call in this thread says
        self._trained: dict[str, AdapterRef] = {}

    def set_default(self, name: Any, span: BlockSpan) -> None:
        """From now on. Raises AdapterNotServed at once if servers of `span` do not have it."""
        wanted = _name(name)
        if wanted is not None:
            self._trained[wanted] = self._find(wanted, span)
        self.default = wanted

    @contextlib.contextmanager
    def calling(self, choice: Choice | NotGiven) -> Iterator[None]:
        """Within it, calls that say nothing themselves have these adapters."""
        if choice is NOT_GIVEN:
            yield
            return
        before = self._current
        self._calls.current = _Call(choice)
        try:
            yield
        finally:
            self._calls.current = before

    def expand(self, num_rows: int, copies: int) -> None:
        """The call in this thread has `num_rows` rows, and will make so many of each. Raises UsageError."""
        if self._current is not None:
            _for_rows(self._current.choice, num_rows)
            self._current.copies = copies

    def chosen(self, num_rows: int, choice: Choice | NotGiven = NOT_GIVEN) -> tuple[str | None, ...] | None:
        """The names that a call gives its rows, `choice` before what is said around it; None if it gives none.

        Raises UsageError unless there are as many names as rows.
        """
        if choice is not NOT_GIVEN:
            return _for_rows(choice, num_rows)
        if self._current is None:
            return None
        return _for_rows(self._current.choice, num_rows, self._current.copies)

    def names(self, num_rows: int, choice: Choice | NotGiven = NOT_GIVEN) -> tuple[str | None, ...]:
        chosen = self.chosen(num_rows, choice)
        return (self.default,) * num_rows if chosen is None else chosen

    def of_session(self, num_rows: int, span: BlockSpan, choice: Choice | NotGiven = NOT_GIVEN) -> RowAdapters | None:
        """For a session that is about to be opened. Raises AdapterNotServed, UsageError."""
        names = self.names(num_rows, choice)
        found = {name: self._find(name, span) for name in dict.fromkeys(names) if name is not None}
        return row_adapters([None if name is None else found[name] for name in names])

    def of_pass(self, num_rows: int, span: BlockSpan, choice: Choice | NotGiven = NOT_GIVEN) -> Refs:
        """For a forward pass. Raises AdapterNotServed, UsageError.

        A name means the same contents in all passes, until it is given to `set_default` again: what is trained on top
        of an adapter shall not find another one under it.
        """
        return tuple(None if name is None else self._pinned(name, span) for name in self.names(num_rows, choice))

    def check_session(self, adapters: RowAdapters | None, num_rows: int, choice: Choice | NotGiven = NOT_GIVEN) -> None:
        """Raises UsageError if a call wants others for its rows than the session that it goes to has."""
        chosen, present = self.chosen(num_rows, choice), names_of(adapters, num_rows)
        if chosen is not None and chosen != present:
            raise UsageError(
                f"the session was opened with {_describe(present)} and keeps them for its life; the call wants "
                f"{_describe(chosen)}: open another session"
            )

    @property
    def _current(self) -> _Call | None:
        return getattr(self._calls, "current", None)

    def _pinned(self, name: str, span: BlockSpan) -> AdapterRef:
        if name not in self._trained:
            self._trained[name] = self._find(name, span)
        return self._trained[name]


def names_of(adapters: RowAdapters | None, num_rows: int) -> tuple[str | None, ...]:
    """One for each row; None for a row without an adapter."""
    if adapters is None:
        return (None,) * num_rows
    return tuple(None if ref is None else ref.name for ref in adapters.of_rows())


def _for_rows(choice: Choice, num_rows: int, copies: int = 1) -> tuple[str | None, ...]:
    if not isinstance(choice, tuple):
        return (choice,) * num_rows
    if len(choice) == num_rows:
        return choice
    if len(choice) * copies == num_rows:
        return tuple(name for name in choice for _ in range(copies))
    raise UsageError(f"adapter_names names {len(choice)} adapters for {num_rows} rows: give one (or None) for each row")


def _describe(names: Sequence[str | None]) -> str:
    different = dict.fromkeys(names)
    if list(different) == [None]:
        return "no adapters"
    text = ", ".join("none" if name is None else repr(name) for name in (names if len(different) > 1 else different))
    return f"adapters {text:.300}"
