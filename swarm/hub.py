"""Files of a model on the Hugging Face hub, and the hub library's errors in words of our own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelNotFound
from .fingerprint import recall, remember
from .weight_files import Header, TensorEntry, digest_of, first_line, read_header

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds for the hub to begin an answer
#: A model's configuration takes kilobytes. Strangers choose which adapters a server looks up, so there is a limit.
_MAX_NOTE_BYTES = 8_000_000


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit of a hub model; they are downloaded into the hub library's own cache.

    sizes: in bytes, as the hub says; empty where it was not asked.
    """

    api: HfApi
    model: str
    commit: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    _headers: dict[str, Header] = field(default_factory=dict)

    def path(self, file: str) -> Path:
        with _hub_errors(self.model, file):
            return Path(self.api.hf_hub_download(self.model, file, revision=self.commit))

    def size(self, file: str) -> int:
        """Bytes; of a file whose size the hub does not say, known only once it is fetched."""
        known = self.sizes.get(file)
        return self.path(file).stat().st_size if known is None else known

    def header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = self._fetch_header(file)
        return self._headers[file]

    def digest(self, file: str) -> str:
        return recall(_hub_key(self.model, file), self.commit) or digest_of(self.path(file))

    def _fetch_header(self, file: str) -> Header:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.model, file, revision=self.commit)
        if isinstance(cached, str):
            return read_header(Path(cached))
        with _hub_errors(self.model, file):
            metadata = self.api.parse_safetensors_file_metadata(self.model, file, revision=self.commit)
        return {
            name: TensorEntry(info.dtype, info.data_offsets[1] - info.data_offsets[0])
            for name, info in metadata.tensors.items()
        }


def find_on_hub(model: str, revision: str | None, token: str | None) -> tuple[HubFiles, set[str]]:
    """A hub model's files and their names. When the hub cannot be reached: what was downloaded of it before.

    Raises ModelNotFound.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        with _hub_errors(model, revision):
            info = api.model_info(model, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except _HubUnreachable as error:
        commit, present = _downloaded(api, model, revision, error)
        sizes: dict[str, int] = {}
    else:
        siblings = info.siblings or []
        commit, present = str(info.sha), {sibling.rfilename for sibling in siblings}
        sizes = {sibling.rfilename: sibling.size for sibling in siblings if sibling.size is not None}
        remember(
            {
                _hub_key(model, sibling.rfilename): sibling.lfs.sha256
                for sibling in siblings
                if sibling.lfs is not None and sibling.rfilename.endswith(".safetensors")
            },
            commit,
        )
        if "config.json" in present and sizes.get("config.json", 0) <= _MAX_NOTE_BYTES:
            with _hub_errors(model, "config.json"):
                # By revision, not by commit: only so the library notes which commit this is, for when the hub is away.
                api.hf_hub_download(model, "config.json", revision=revision)
    return HubFiles(api, model, commit, sizes), present


def _downloaded(api: HfApi, model: str, revision: str | None, reason: _HubUnreachable) -> tuple[str, set[str]]:
    """(commit, files) of a hub model as far as it was downloaded before. Raises ModelNotFound if it never was."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        config = Path(api.hf_hub_download(model, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        cause = reason.__cause__ or reason
        raise ModelNotFound(f"{model} is no folder here, and the hub cannot be reached: {first_line(cause)}") from cause
    logger.warning("%s; using what was downloaded of it before", reason)
    return config.parent.name, set(os.listdir(config.parent))


class _HubUnreachable(ModelNotFound):
    """The hub gave no answer, or none that says anything about the model."""


@contextmanager
def _hub_errors(model: str, what: str | None) -> Iterator[None]:
    """Translate the hub library's errors. what: the file or revision that was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(
            f"the hub model {model} is gated: accept its licence on its page, then log in or give a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{model} is neither a folder here nor a model on the hub (a private model needs a token)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"the hub model {model} has no revision {what}") from error
    except HFValidationError as error:
        raise ModelNotFound(f"{model!r} is neither a folder here nor a valid hub id") from error
    except RemoteEntryNotFoundError as error:
        raise ModelNotFound(f"the hub model {model} has no file {what}") from error
    except SafetensorsParsingError as error:
        raise ModelNotFound(f"{what} of the hub model {model} has a damaged header") from error
    except Exception as error:  # which HTTP library's errors these are depends on the version of the hub library
        raise _HubUnreachable(
            f"cannot fetch {what or 'the list of files'} of {model} from the hub: {first_line(error)}"
        ) from error


def _hub_key(model: str, file: str) -> str:
    return f"hub:{model}/{file}"
