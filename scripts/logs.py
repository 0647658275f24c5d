"""What commands say on stderr: warnings and progress, as lines for people or, with --log-json, one JSON object a line.

Libraries bring handlers and formats of their own; `adopt_loggers` takes those away. With --log-json whatever else is
written to sys.stderr becomes an object, too. What native code writes there when a process crashes is left as it is.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Any, TextIO

import typer

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Write stderr as JSON, an object a line, for log collectors.")
]

#: Most characters of one message: somebody may write without ever ending a line.
_MAX_MESSAGE = 65_536

#: hivemind renames WARNING; names by number are the same whatever libraries do.
_LEVELS = (
    (logging.CRITICAL, "CRITICAL"),
    (logging.ERROR, "ERROR"),
    (logging.WARNING, "WARNING"),
    (logging.INFO, "INFO"),
)

#: What every record has; other attributes are what the caller gave as `extra`.
_USUAL_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_progress = logging.getLogger("swarm.progress")
_commands = logging.getLogger("swarm.command")


def set_up_logging(verbose: bool, log_json: bool = False) -> None:
    """Warnings (or, if `verbose`, everything of interest) on stderr, one line each. Advice for programmers is hidden.

    log_json: every line of stderr is a JSON object from here on, to the end of the process.
    """
    level = logging.INFO if verbose else logging.WARNING
    # Read when hivemind is imported, which takes seconds: too long for here.
    os.environ.setdefault("HIVEMIND_LOGLEVEL", logging.getLevelName(level))
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(level if verbose else logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_news)
    if log_json:
        _write_json(level)
    else:
        logging.basicConfig(
            stream=sys.stderr,
            level=level,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            datefmt="%H:%M:%S",
        )


def adopt_loggers() -> None:
    """Let libraries that were imported by now log as we do: their handlers for stderr go, ours gets their records."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.__stderr__):
                logger.removeHandler(handler)
                logger.propagate = True
    # It logs more than the rest, and a logger's own level counts, not those of its ancestors.
    logging.getLogger("hivemind").setLevel(logging.root.level)


def say(text: str) -> None:
    """Tell in a few words what a long-running command is doing, however little is logged."""
    if _writes_json():
        _progress.info(text)
    else:
        print(f"{text} ...", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What an error says, for a person; its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def say_error(message: str) -> None:
    """Tell why a command ends, in one line."""
    if _writes_json():
        _commands.error(message)
    else:
        print(f"error: {message}", file=sys.stderr)


class JsonFormatter(logging.Formatter):
    """A line for each record: time (ISO 8601, UTC), level, logger, message, exception if any, and what `extra` held."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _iso_time(record.created),
            "level": _level_name(record.levelno),
            "logger": record.name,
            "message": _shortened(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["exception"] = record.exc_text
        if record.stack_info:
            fields["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in _USUAL_ATTRIBUTES:
                fields.setdefault(name, _plain(value))
        # ASCII: some readers take U+2028 for the end of a line.
        return json.dumps(fields, ensure_ascii=True, allow_nan=False)


class JsonLines(io.TextIOBase):
    """Stands in for sys.stderr: each line that is written becomes a record of the logger "stderr".

    Of a line that is overwritten again and again, as progress bars do, the last state counts.
    """

    def __init__(self, target: TextIO):
        self.target = target
        self._formatter = JsonFormatter()
        self._begun = threading.local()  # lines of threads must not mix

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        for line in lines:
            self._emit(_last_state(line))
        self._begun.text = _last_state(rest) + ("\r" if rest.endswith("\r") else "")
        if len(self._begun.text) > _MAX_MESSAGE:
            self._emit(self._begun.text)
            self._begun.text = ""
        return len(text)

    def _emit(self, line: str) -> None:
        if line.strip():
            record = logging.LogRecord("stderr", logging.WARNING, "", 0, line, None, None)
            self.target.write(self._formatter.format(record) + "\n")
            self.target.flush()

    def flush(self) -> None:
        self.target.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.target.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


def _is_news(record: logging.LogRecord) -> bool:
    """Not what hivemind's search leaves behind when it ends before a peer that hangs: a task that waits for its end."""
    message = record.getMessage()
    return not ("Task was destroyed but it is pending" in message and "coro=<Event.wait() " in message)


def _write_json(level: int) -> None:
    target = sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    _progress.setLevel(logging.INFO)
    sys.stderr = JsonLines(target)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread
    sys.unraisablehook = _log_unraisable
    # Bars are for terminals; the hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _writes_json() -> bool:
    return isinstance(sys.stderr, JsonLines)


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _commands.critical("this process ends by a bug: %r", error, exc_info=(kind, error, traceback))


def _log_uncaught_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread is not None else "?"
        exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
        _commands.error("thread %s ends by a bug: %r", name, args.exc_value, exc_info=exc_info)


def _log_unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value
    exc_info = None if error is None else (unraisable.exc_type, error, unraisable.exc_traceback)
    _commands.error("%s: %.300r", unraisable.err_msg or "exception ignored in", unraisable.object, exc_info=exc_info)


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _last_state(line: str) -> str:
    """What a terminal shows of a line in the end."""
    return line.rstrip("\r").rpartition("\r")[2]


def _level_name(level: int) -> str:
    return next((name for least, name in _LEVELS if level >= least), "DEBUG")


def _shortened(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + " ..."


def _plain(value: Any) -> str | int | float | bool | None:
    """What JSON can hold of a field."""
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _shortened(str(value))
