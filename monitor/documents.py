"""Answers that many ask for: made once, kept as bytes, sent again only to those who lack them."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property

from starlette.datastructures import Headers
from starlette.responses import Response

#: Shorter ones do not gain by compression.
_WORTH_COMPRESSING = 1024


@dataclass(frozen=True)
class Document:
    """tag: another one for other contents, never used again."""

    body: bytes
    media_type: str
    tag: str

    @classmethod
    def of(cls, body: bytes, media_type: str) -> Document:
        """Tagged by its contents."""
        return cls(body, media_type, hashlib.sha256(body).hexdigest()[:32])

    @cached_property
    def compressed(self) -> bytes | None:
        """None: it does not gain by it."""
        if len(self.body) < _WORTH_COMPRESSING or self.media_type.startswith("image/"):
            return None
        return gzip.compress(self.body, compresslevel=1, mtime=0)

    def answer(self, asked: Headers) -> Response:
        """The document, compressed if the caller takes that, or 304 if he has it. asked: headers of his request."""
        compressed = self.compressed if _takes_gzip(asked.get("accept-encoding", "")) else None
        tag = f'"{self.tag}"' if compressed is None else f'"{self.tag}-gzip"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        if _names(asked.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        if compressed is not None:
            headers["Content-Encoding"] = "gzip"
        return Response(compressed or self.body, media_type=self.media_type, headers=headers)


def _takes_gzip(header: str) -> bool:
    for part in header.lower().split(","):
        coding, _, quality = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _names(header: str, tag: str) -> bool:
    tags = [one.strip().removeprefix("W/") for one in header.split(",")]
    return tag in tags or "*" in tags
