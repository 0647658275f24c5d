"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

#: Wide enough for every column where there is no terminal to tell us.
_WIDTH_OF_FILES = 160


def table_console() -> Console:
    """A console on stdout; as wide as the terminal, if it is one."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)
