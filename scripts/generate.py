"""`swarm generate`: complete a prompt over the swarm. The text goes to stdout, everything about it to stderr."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import UsageError

from .joining import joined
from .logs import Verbose, set_up_logging
from .options import Adapter, InitialPeers, SwarmKeyFile, required_peers
from .run_server import DType

if TYPE_CHECKING:
    from swarm.client.inference_session import InferenceSession

    from .answering import Answer


def generate(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="The text to go on with.", show_default=False)],
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of prompt and answer together.", show_default="the model's context"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sample if above 0; 0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Ask by the model's chat template.")] = False,
    dtype: Annotated[DType, typer.Option(help="Of the client's embeddings and head; auto: as stored.")] = DType.AUTO,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)
    ] = None,
    show_route: Annotated[
        bool, typer.Option("--show-route/--no-show-route", help="Print the chain and where a token's time went.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its figures as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Complete a prompt over the swarm, streaming to stdout. The route and the speed go to stderr."""
    peers = required_peers(initial_peers)
    set_up_logging(verbose)
    connection = joined(
        model, peers, swarm_key, revision=revision, dtype=dtype.value, show_route=show_route, adapter=adapter
    )
    with connection as (llm, tokenizer):
        import torch

        from . import answering

        sampling = answering.Sampling(max_new_tokens, temperature, top_p, top_k)
        tokens = encode(tokenizer, prompt, chat, model)
        length = answering.session_length(
            len(tokens), max_new_tokens, max_length=max_length, context=answering.context_length(llm)
        )
        if seed is not None:
            torch.manual_seed(seed)
        with llm.inference_session(max_length=length) as session:
            write = (lambda text: None) if as_json else answering.write_to_stdout
            answer = answering.answer(llm, tokenizer, session, tokens, sampling=sampling, write=write)
            print(json.dumps(to_json(answer, session, tokens)) if as_json else "")
            print(describe(answer, session), file=sys.stderr)
            if show_route:
                print(session.report(), file=sys.stderr)


def encode(tokenizer: Any, prompt: str, chat: bool, model: str) -> list[int]:
    """The prompt as tokens. Raises UsageError if there are none, or if `model` has no chat template."""
    if chat:
        if not tokenizer.chat_template:
            raise UsageError(f"{model} has no chat template; use --no-chat")
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise UsageError("the prompt is empty: write some text after --prompt")
    return list(tokens)


def describe(answer: Answer, session: InferenceSession) -> str:
    """The figures of an answer, and what happened on its way, for a person."""
    from .answering import servers_of

    lines = [f"{answer.size_and_speed}, the first after {answer.times[0]:.2f} s"]
    for replacement in session.replacements:
        lines.append(
            f"replaced server ...{replacement.lost.peer_id[-6:]} of blocks {replacement.lost.span} in "
            f"{replacement.time:.2f} s ({servers_of(replacement.found)}; {replacement.replayed_tokens} tokens "
            f"replayed): {replacement.reason}"
        )
    return "\n".join(lines)


def to_json(answer: Answer, session: InferenceSession, prompt_tokens: list[int]) -> dict[str, Any]:
    """The same for programs. Times in seconds since the request was made."""
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": prompt_tokens,
        "token_times": answer.times,
        "tokens_per_second": answer.tokens_per_second,
        "route": [{"peer_id": link.peer_id, "blocks": str(link.span)} for link in session.chain],
        "replacements": [
            {
                "lost": replacement.lost.peer_id,
                "found": [link.peer_id for link in replacement.found],
                "reason": replacement.reason,
                "replayed_tokens": replacement.replayed_tokens,
                "seconds": replacement.time,
            }
            for replacement in session.replacements
        ],
        "times": asdict(session.report()),
    }
