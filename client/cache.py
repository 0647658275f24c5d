"""The transformers `Cache` whose contents live on the servers of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import Cache

from swarm.errors import NotSupported

if TYPE_CHECKING:
    from .inference_session import InferenceSession
    from .split_session import SplitSession


class RemoteCache(Cache):
    """What generation asks of a cache, answered for a session.

    `columns` counts the tokens fed so far with padding, as transformers does; the session counts real tokens per row.
    Soft prompts in front of every row are tokens to the session, and hidden from transformers.

    prompt_tokens: of soft prompts. filled: columns with them.
    """

    def __init__(self, session: InferenceSession | SplitSession):
        super().__init__(layers=[])
        self.session = session
        self.prompt_tokens = 0
        self.filled = 0

    @property
    def columns(self) -> int:
        return max(0, self.filled - self.prompt_tokens)

    def begin(self, prompt_tokens: int) -> None:
        """Start anew: so many soft prompts go before the first token."""
        self.reset()
        self.prompt_tokens = prompt_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.session.max_length - self.prompt_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return self.session.num_rows

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        columns = max(0, self.columns + tokens_to_remove)
        if not columns:
            self.reset()
            return
        kept = [max(min(length, self.prompt_tokens), length + tokens_to_remove) for length in self.session.lengths]
        self.session.rewind(kept)
        self.filled = self.prompt_tokens + columns

    def reset(self) -> None:
        self.session.rewind([0] * self.session.num_rows)
        self.filled = 0

    def activate_past_recording(self) -> None:
        pass  # servers keep every token until the session ends, so any crop is possible

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("keys and values live on the servers; no local layer may write to this cache")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.session.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise NotSupported("repeating the rows of a filled cache does not work over the swarm yet")

    def batch_select_indices(self, indices: Any) -> NoReturn:
        raise NotSupported("selecting rows of a filled cache does not work over the swarm yet")
