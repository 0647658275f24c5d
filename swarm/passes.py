"""The messages of forward and backward passes: whole sequences through a span, without a cache, for training.

A *pass stream* carries one pass. The client writes a `PassRequest`, then its tensors in `TensorPart`s: the hidden
states, the deep prompts if there are any, and for a backward pass the gradient of its output. The server answers with a
`PassResult` and its tensors (the output; or the gradients of hidden states and prompts), or with an `ErrorReply`, and
the stream ends. A stream that the client ends early cancels its pass.

A backward pass brings its forward's inputs along, since servers keep nothing between calls: it computes the activations
anew (PETALS, Borzunov et al., NeurIPS'23, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from .codecs import Codec, row_bytes
from .data_structures import PROTOCOL_VERSION, BlockSpan, Fingerprint
from .errors import MessageTooLarge
from .protocol import MAX_PAYLOAD_BYTES, MAX_POSITION, MAX_ROWS, Message, Microseconds, RowAdapters, TensorMeta

PASS_STREAM = f"petswarm/pass/{PROTOCOL_VERSION}"

#: Tokens that a client sends in one pass, unless a single sequence is longer (PETALS, section 3.2).
MAX_PASS_TOKENS = 1024


class PassRequest(Message):
    """Client -> server: run these sequences through `span`, forward or backward.

    lengths: tokens of each sequence; they lie side by side in the hidden states, [sum(lengths), hidden_size].
    prompts: deep prompts, [blocks of the span * prompt tokens, hidden_size]: before each block, its share is added to
    the hidden states of the first tokens of every sequence (P-tuning v2, Liu et al., ACL'22).
    gradient: of the output, in the output's shape. With it the pass is a backward one.
    output_codec: how the answer's tensors shall travel.
    adapters: of the sequences; None: no sequence has one.
    """

    kind: ClassVar[str] = "pass"
    fingerprint: Fingerprint
    span: BlockSpan
    lengths: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_POSITION)], ...], Field(min_length=1, max_length=MAX_ROWS)
    ]
    output_codec: Codec
    hidden: TensorMeta
    prompts: TensorMeta | None = None
    gradient: TensorMeta | None = None
    adapters: RowAdapters | None = None

    @property
    def tensors(self) -> list[TensorMeta]:
        """In the order in which they travel."""
        return [meta for meta in (self.hidden, self.prompts, self.gradient) if meta is not None]


class TensorPart(Message):
    """Consecutive rows of the tensor that is on its way, as the message's payload: as many as fit into one message."""

    kind: ClassVar[str] = "part"


class PassResult(Message):
    """Server -> client: the pass is done.

    hidden: the output, or for a backward pass the gradient of the hidden states. prompts: their gradient, summed over
    the sequences; of backward passes with deep prompts alone.
    queue_time, compute_time: how long the pass waited for the device, and how long that worked on it.
    """

    kind: ClassVar[str] = "passed"
    hidden: TensorMeta
    prompts: TensorMeta | None = None
    queue_time: Microseconds
    compute_time: Microseconds

    @property
    def tensors(self) -> list[TensorMeta]:
        """In the order in which they travel."""
        return [meta for meta in (self.hidden, self.prompts) if meta is not None]


def tensor_bytes(meta: TensorMeta) -> int:
    """Raises ProtocolError for a codec that does not hold such rows."""
    return meta.shape[0] * row_bytes(meta.codec, meta.shape[1])


def parts_of(meta: TensorMeta, data: memoryview) -> Iterator[memoryview]:
    """A tensor's bytes as the payloads of `TensorPart`s: whole rows. Raises MessageTooLarge if not one row fits."""
    size = row_bytes(meta.codec, meta.shape[1])
    if size > MAX_PAYLOAD_BYTES:
        raise MessageTooLarge(f"a row of {size} bytes is over the limit of {MAX_PAYLOAD_BYTES} per message")
    step = MAX_PAYLOAD_BYTES // max(size, 1) * size
    for first in range(0, len(data), step):
        yield data[first : first + step]
