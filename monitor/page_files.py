"""The files of the page, read once."""

from __future__ import annotations

from pathlib import Path

from .documents import Document

PAGE_FOLDER = Path(__file__).parent / "page"
#: What "/" shows.
INDEX = "index.html"

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/vnd.microsoft.icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


def read_page(folder: Path) -> dict[str, Document]:
    """The files by the path under which a browser asks for them.

    Raises FileNotFoundError without INDEX, KeyError for a kind of file that no page of ours has.
    """
    found = {
        f"/{file.name}": Document.of(file.read_bytes(), _MEDIA_TYPES[file.suffix])
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    }
    if f"/{INDEX}" not in found:
        raise FileNotFoundError(f"{folder} has no {INDEX}: this installation is not complete")
    return {"/": found[f"/{INDEX}"], **found}
