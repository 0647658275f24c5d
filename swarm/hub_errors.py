"""The hub library's errors, in words of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import DownloadFailed, ModelNotFound, SwarmError
from .weight_files import first_line

_REFUSALS = {
    401: "hub does not accept your token: log in anew (hf auth login), or mend or remove HF_TOKEN",
    403: "hub forbids it: give your token the right to read this model, or use another one",
}


class HubUnreachable(DownloadFailed):
    """The hub gave no answer, or none that says anything about the model."""


@contextmanager
def hub_errors(model: str, what: str | None) -> Iterator[None]:
    """Translate the hub library's errors. what: the file or revision that was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = what or "the list of files"
    try:
        yield
    except SwarmError:
        raise
    except GatedRepoError as error:
        raise ModelNotFound(
            f"the hub model {model} is gated: accept its licence on its page, then log in (hf auth login) or set "
            "HF_TOKEN to a token of yours"
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
    except Exception as error:  # which HTTP library's errors these are depends on the version of the hub library
        # Of a file, the library says only that it could not be had; the hub's answer is the cause of that.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError):
            reason = _REFUSALS.get(answer.response.status_code) or f"hub says: {first_line(answer)}"
            raise HubUnreachable(f"cannot fetch {asked} of {model}: the {reason}") from answer
        raise HubUnreachable(f"cannot fetch {asked} of {model} from the hub: {first_line(error)}") from error
