"""`swarm chat`: talk to a model in the terminal. One inference session keeps the cache of the whole conversation."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import SwarmError, UsageError

from .joining import joined
from .logs import Verbose, set_up_logging
from .options import Adapter, InitialPeers, SwarmKeyFile, required_peers
from .run_server import DType

if TYPE_CHECKING:
    from swarm.client.inference_session import InferenceSession
    from swarm.routing.chain import Chain

    from .answering import Answer, Sampling

_HELP = (
    "/reset forgets the conversation, /adapter NAME answers with an adapter from now on (without a name: with none), "
    "/exit or Ctrl-D leaves, Ctrl-C stops an answer"
)


def chat(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.", show_default=False)],
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_length: Annotated[
        int, typer.Option(min=1, help="Most tokens of the conversation; servers reserve them.")
    ] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Sample if above 0; 0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: all.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Of the client's embeddings and head; auto: as stored.")] = DType.AUTO,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)
    ] = None,
    show_route: Annotated[
        bool, typer.Option("--show-route/--no-show-route", help="Print the chain and where a token's time went.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Chat with a model over the swarm. Lines may also come from a pipe: one message each."""
    peers = required_peers(initial_peers)
    set_up_logging(verbose)
    connection = joined(
        model, peers, swarm_key, revision=revision, dtype=dtype.value, show_route=show_route, adapter=adapter
    )
    with connection as (llm, tokenizer):
        from . import answering

        if not tokenizer.chat_template:
            raise UsageError(f"{model} has no chat template; use swarm generate")
        length = min(max_length, answering.context_length(llm) or max_length)
        sampling = answering.Sampling(max_new_tokens, temperature, top_p, top_k)
        figures = show_route or sys.stdin.isatty()
        with Conversation(llm, tokenizer, length, sampling, system, figures=figures) as conversation:
            talk(conversation)
            if show_route:
                print(conversation.session.report(), file=sys.stderr)


def talk(conversation: Conversation) -> None:
    """Answer line by line until standard input ends, or /exit."""
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    for line in read_lines():
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
            case "/adapter":
                conversation.use_adapter(None)
            case command if command.startswith("/adapter "):
                conversation.use_adapter(command.removeprefix("/adapter ").strip())
            case message:
                conversation.say(message)


def read_lines() -> Iterator[str]:
    """Lines of standard input; in a terminal with a prompt and line editing, where Ctrl-C only clears the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (input() edits lines once it is imported)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


class Conversation:
    """Messages so far, and the session that holds them. A context manager.

    max_length: of the session, in tokens. figures: whether to say after each answer how fast it came, and over whom.
    """

    session: InferenceSession

    def __init__(
        self, llm: Any, tokenizer: Any, max_length: int, sampling: Sampling, system: str | None, *, figures: bool
    ):
        self._llm = llm
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._sampling = sampling
        self._figures = figures
        self._sessions = ExitStack()
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._beginning)
        self._tokens: list[int] = []  # of the last request and its answer; the session holds the first of them

    def __enter__(self) -> Conversation:
        self._open_session()
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.close()

    def _open_session(self) -> None:
        """In the place of the one before: a session keeps the adapter that it was opened with."""
        self._sessions.close()
        self._tokens = []
        self.session = self._sessions.enter_context(self._llm.inference_session(max_length=self._max_length))

    def use_adapter(self, name: str | None) -> None:
        """Let servers apply this adapter from now on, None for none. If they do not have it, say so and go on."""
        try:
            self._llm.set_adapter(name)
        except SwarmError as error:
            print(error, file=sys.stderr)
            return
        self._open_session()

    def reset(self) -> None:
        """Forget what was said. The session stays; what the next conversation shares with this one stays cached."""
        self._messages = list(self._beginning)

    def say(self, message: str) -> None:
        """Print the answer to `message` as it comes. Raises what a step of the session raises."""
        from .answering import answer, write_to_stdout

        messages = [*self._messages, {"role": "user", "content": message}]
        tokens = list(
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        if len(tokens) >= self._max_length:
            print(
                f"the conversation would have {len(tokens)} tokens, which leaves no room for an answer in "
                f"{self._max_length}; shorten the message, or /reset",
                file=sys.stderr,
            )
            return
        cached = self._tokens[: self.session.position]
        # At least the last token is sent again: its output gives the first token of the answer.
        self.session.position = min(common_length(cached, tokens), len(tokens) - 1)
        with stopped_by_ctrl_c() as criteria:
            answered = answer(
                self._llm,
                self._tokenizer,
                self.session,
                tokens,
                sampling=self._sampling,
                write=write_to_stdout,
                stopping_criteria=[criteria],
            )
        print(flush=True)
        if self._figures:
            print(describe(answered, self.session.chain), file=sys.stderr)
        self._tokens = tokens + answered.tokens
        self._messages = [*messages, {"role": "assistant", "content": answered.text}]


def describe(answer: Answer, chain: Chain) -> str:
    """How fast an answer came, and over which servers."""
    from .answering import servers_of

    return f"[{answer.size_and_speed} over {servers_of(chain)}]"


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Any]:
    """A stopping criterion for `generate` that is met after Ctrl-C, so that the session stays whole.

    A second Ctrl-C interrupts the step itself, in case that it hangs.
    """
    import torch

    asked = threading.Event()

    def on_ctrl_c(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    def criterion(tokens: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((tokens.shape[0],), asked.is_set())

    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield criterion
    finally:
        signal.signal(signal.SIGINT, before)
