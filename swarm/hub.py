"""Files of a model on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DownloadFailed, ModelNotFound
from .hub_errors import HubUnreachable, hub_errors
from .hub_parts import (
    FileRanges,
    HubParts,
    Listing,
    RemoteFile,
    remote_file,
    save_listing,
    saved_listing,
    tensor_ranges,
)
from .progress import Progress
from .weight_files import Header, digest_of, first_line, read_header

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds for the hub to begin an answer
#: A model's configuration takes kilobytes. Strangers choose which adapters a server looks up, so there is a limit.
_MAX_NOTE_BYTES = 8_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class HubFiles:
    """Files of one commit of a hub model.

    Whole files are downloaded by the hub library, into its own cache. Of weight files only parts are fetched, into ours
    (see hub_parts.py), unless the library's cache has them already or the hub does not know their sha256.
    listing: what the hub says of the files; empty where it was not asked.
    """

    api: HfApi
    model: str
    commit: str
    listing: Listing = field(default_factory=dict)
    _headers: dict[str, Header] = field(default_factory=dict)
    _asked: dict[str, RemoteFile] = field(default_factory=dict)
    _here: dict[str, Path] = field(default_factory=dict)  # whole weight files

    def path(self, file: str) -> Path:
        with hub_errors(self.model, file):
            return Path(self.api.hf_hub_download(self.model, file, revision=self.commit))

    def size(self, file: str) -> int:
        """Bytes; of a file whose size the hub does not say, known only once it is fetched."""
        known = self.listing.get(file)
        return self.path(file).stat().st_size if known is None else known.size

    def digest(self, file: str) -> str:
        """The sha256. Reads the file only if it is a small one, of which the hub has none."""
        known = self.listing.get(file)
        if known is not None and known.sha256 is not None:
            return known.sha256
        if (cached := self._cached(file)) is not None:
            return digest_of(cached)
        remote = self._remote(file)
        return digest_of(self.path(file)) if remote.sha256 is None else remote.sha256

    def header(self, file: str) -> Header:
        if file not in self._headers:
            whole = self._whole(file)
            self._headers[file] = self._parts.header(file, self._remote(file)) if whole is None else read_header(whole)
        return self._headers[file]

    def fetch(self, wanted: Mapping[str, Collection[str]], progress: Progress) -> dict[str, Path]:
        paths, ranges = self._split(wanted)
        if ranges:
            save_listing(self.model, self.commit, {**self.listing, **self._asked})
            paths |= self._parts.fetch(ranges, progress)
        return paths

    def missing(self, wanted: Mapping[str, Collection[str]]) -> int:
        return self._parts.missing(self._split(wanted)[1])

    def _split(self, wanted: Mapping[str, Collection[str]]) -> tuple[dict[str, Path], FileRanges]:
        """Which files are here as far as they are wanted, and which parts are wanted of the others."""
        paths: dict[str, Path] = {}
        ranges: FileRanges = {}
        for file, names in wanted.items():
            path = self._here.get(file)
            if path is None or not path.exists():
                path = self._whole(file)
            if path is not None:
                paths[file] = self._here[file] = path
                continue
            header = self.header(file)
            if absent := sorted(set(names) - header.keys()):
                raise ModelNotFound(f"{file} of the hub model {self.model} lacks the tensor {absent[0]}")
            ranges[file] = (self._remote(file), tensor_ranges(header, names))
        return paths, ranges

    def _cached(self, file: str) -> Path | None:
        """All of a file, if the hub library has it."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.model, file, revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def _whole(self, file: str) -> Path | None:
        """All of a weight file, if it is here or cannot be had in parts."""
        cached = self._cached(file)
        return self.path(file) if cached is None and self._remote(file).sha256 is None else cached

    def _remote(self, file: str) -> RemoteFile:
        """What the hub says of a file; asks for it if the list of files did not tell."""
        known = self._asked.get(file) or self.listing.get(file)
        if known is None or (known.sha256 is None and file not in self._asked):
            with hub_errors(self.model, file):
                metadata = self.api.get_hf_file_metadata(url=self._url(file), timeout=_TIMEOUT)
                # The hub's tag of a large file is its sha256.
                known = self._asked[file] = remote_file(metadata.size, metadata.etag)
        return known

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.model, file, revision=self.commit, endpoint=self.api.endpoint)

    @cached_property
    def _parts(self) -> HubParts:
        from huggingface_hub.utils import build_hf_headers

        return HubParts(self.model, self.commit, self._url, build_hf_headers(token=self.api.token))


def find_on_hub(model: str, revision: str | None, token: str | None) -> tuple[HubFiles, set[str]]:
    """A hub model's files and their names. When the hub cannot be reached: what was downloaded of it before.

    Raises ModelNotFound.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        with hub_errors(model, revision):
            info = api.model_info(model, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except HubUnreachable as error:
        return _downloaded(api, model, revision, error)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise DownloadFailed(f"the hub does not say which commit of {model} it has")
    siblings = info.siblings or []
    present = {sibling.rfilename for sibling in siblings}
    with hub_errors(model, revision):
        listing = {
            sibling.rfilename: remote_file(sibling.size, sibling.lfs and sibling.lfs.sha256)
            for sibling in siblings
            if sibling.size is not None
        }
    config = listing.get("config.json")
    if "config.json" in present and (config is None or config.size <= _MAX_NOTE_BYTES):
        with hub_errors(model, "config.json"):
            # By revision, not by commit: only so the library notes which commit this is, for when the hub is away.
            api.hf_hub_download(model, "config.json", revision=revision)
    return HubFiles(api, model, info.sha, listing), present


def _downloaded(api: HfApi, model: str, revision: str | None, reason: HubUnreachable) -> tuple[HubFiles, set[str]]:
    """A hub model as far as it was downloaded before. Raises ModelNotFound if it never was."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = Path(api.hf_hub_download(model, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        cause = reason.__cause__ or reason
        if isinstance(cause, HfHubHTTPError):  # it was reached, and said why not
            raise ModelNotFound(f"{model} is no folder here; {reason}") from cause
        raise ModelNotFound(f"{model} is no folder here, and the hub cannot be reached: {first_line(cause)}") from cause
    logger.warning("%s; using what was downloaded of it before", reason)
    commit = config.parent.name
    listing = saved_listing(model, commit)
    return HubFiles(api, model, commit, listing), {*listing, *os.listdir(config.parent)}
