"""Parts of a file on the hub, over several connections at once, through the hub library's own HTTP session.

Proxies, certificates, HF_ENDPOINT, HF_HUB_OFFLINE and tokens are the library's business. What is ours: asking for byte
ranges, going on where a connection broke, and giving up in the end.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .byte_ranges import ByteRange
from .errors import DownloadFailed
from .hub_errors import hub_errors

logger = logging.getLogger(__name__)

CONNECTIONS = 4
#: Bytes of one request; a longer range is cut, so that all connections have work.
REQUEST_BYTES = 2**26
#: Seconds before each further attempt, counted from the last byte that came.
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
#: A hub that says how long to wait (it limits requests in five minutes) is believed up to this many seconds.
LONGEST_WAIT = 300.0

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_RATE_LIMIT_ENDS = re.compile(r"\bt=(\d{1,6})\b")


@dataclass(frozen=True)
class Piece:
    """One request: bytes [start, end) of a model's file.

    write: given each part that came, with its offset. done: called when all of it came. Both from any thread.
    """

    model: str
    file: str
    url: str
    size: int
    range: ByteRange
    write: Callable[[int, bytes], None]
    done: Callable[[], None]


def download(pieces: Sequence[Piece], headers: Mapping[str, str]) -> None:
    """Fetch all pieces; the first failure ends all, and so does what their functions raise.

    headers: of every request. Raises ModelNotFound, mostly DownloadFailed.
    """
    left = deque(pieces)
    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set() and (piece := _next_of(left)) is not None:
                _fetch(piece, headers, stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    # Daemons: a process that is told to end does not wait for them.
    threads = [
        threading.Thread(target=work, name=f"hub-{number}", daemon=True)
        for number in range(min(CONNECTIONS, len(pieces)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _next_of(left: deque[Piece]) -> Piece | None:
    try:
        return left.popleft()
    except IndexError:
        return None


def _fetch(piece: Piece, headers: Mapping[str, str], stop: threading.Event) -> None:
    position, end = piece.range
    failures = 0
    while position < end and not stop.is_set():
        try:
            with closing(_receive(piece, position, headers)) as chunks:
                while (chunk := _next(chunks)) is not None:
                    piece.write(position, chunk)
                    position += len(chunk)
                    failures = 0
                    if stop.is_set():
                        return
            if position < end:
                raise _Broken(ConnectionError(f"the connection ended after {position - piece.range[0]} bytes"))
        except _Broken as broken:
            if failures == len(RETRY_DELAYS):
                with hub_errors(piece.model, piece.file):
                    raise broken.error from None
            delay = max(RETRY_DELAYS[failures], broken.wait)
            failures += 1
            logger.info("%s: %s; trying again in %g s", piece.file, broken.error, delay)
            _wait(stop, delay)
    piece.done()


class _Broken(Exception):
    """May work another time. wait: seconds that the hub asks for."""

    def __init__(self, error: Exception, wait: float = 0.0):
        super().__init__(str(error))
        self.error = error
        self.wait = wait


def _wait(stop: threading.Event, delay: float) -> None:
    stop.wait(delay)


def _next(chunks: Generator[bytes, None, None]) -> bytes | None:
    return next(chunks, None)


def _receive(piece: Piece, position: int, headers: Mapping[str, str]) -> Generator[bytes, None, None]:
    """The bytes from `position` to the end of a piece, or as many as come.

    Raises _Broken if more may come another time, else ModelNotFound.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session, hf_raise_for_status

    end = piece.range[1]
    # The library never sends the token on to another host, where most of the hub's redirects lead.
    asked = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={position}-{end - 1}"}
    try:
        session = get_session()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with session.stream("GET", piece.url, headers=asked, timeout=timeout, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            _check(piece, position, response)
            left = end - position
            # In what sizes it comes, for a library that fills larger ones loses them when the connection breaks. And to
            # the end, so that the connection can be used again.
            for chunk in response.iter_raw():
                if len(chunk) > left:
                    raise DownloadFailed(f"{response.url.host} sends more of {piece.file} than was asked for")
                left -= len(chunk)
                yield chunk
    except DownloadFailed:
        raise
    except (OfflineModeIsEnabled, HfHubHTTPError) as error:
        answer = getattr(error, "response", None)
        if answer is not None and (answer.status_code in (408, 429) or answer.status_code >= 500):
            raise _Broken(error, _wait_asked_for(answer.headers)) from error
        with hub_errors(piece.model, piece.file):
            raise
    except Exception as error:  # which HTTP library's errors these are depends on the version of the hub library
        raise _Broken(error) from error


def _check(piece: Piece, position: int, response: Any) -> None:
    """Raises DownloadFailed unless this is the part of the file that we asked for, as it is on the hub's disk."""
    answered = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or answered is None or "Content-Encoding" in response.headers:
        raise DownloadFailed(
            f"{response.url.host} does not send parts of {piece.file}; download the model as a whole first: hf download"
        )
    start, last, size = map(int, answered.groups())
    if start != position or size != piece.size or last >= piece.range[1]:
        raise DownloadFailed(
            f"{response.url.host} sends bytes {start} to {last} of {size} of {piece.file}, where {position} to "
            f"{piece.range[1] - 1} of {piece.size} were asked for"
        )


def _wait_asked_for(headers: Any) -> float:
    """Seconds after which a hub that refuses for now wants to be asked again; 0 if it does not say."""
    after = headers.get("Retry-After", "")
    if not after.isdecimal():
        limit = _RATE_LIMIT_ENDS.search(headers.get("RateLimit", ""))
        after = limit[1] if limit is not None else "0"
    return min(float(after), LONGEST_WAIT)
