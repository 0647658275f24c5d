"""`swarm generate` against plain transformers, over real servers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarm.client.failover import Replacement
from swarm.data_structures import BlockSpan
from swarm.errors import ModelNotFound, SessionTooLong
from swarm.routing.chain import ChainLink
from swarm.scripts.answering import Answer, TextStream, load_tokenizer, session_length
from swarm.scripts.generate import describe
from swarm.scripts.local_swarm import LocalSwarm

PROMPT = "w17 w99 w4 w250 w31"
TOKENS = [17, 99, 4, 250, 31]


def words(text: str) -> list[int]:
    names = {"<unknown>": 0, "<user>": 1, "<assistant>": 2, "<end>": 3}
    return [names[word] if word in names else int(word.removeprefix("w")) for word in text.split()]


@pytest.fixture
def run_generate(run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm, tiny_chat_folder: Path) -> Callable[..., Any]:
    return lambda *args: run_swarm("generate", tiny_chat_folder, "--initial-peers", *tiny_swarm.initial_peers, *args)


def test_the_text_is_that_of_plain_transformers_and_alone_on_stdout(
    run_generate: Callable[..., Any], continue_locally: Callable[..., list[int]], tiny_swarm: LocalSwarm
) -> None:
    done = run_generate("--prompt", PROMPT, "--max-new-tokens", 40)
    assert done.code == 0, done.err
    assert words(done.out) == continue_locally(TOKENS, max_new_tokens=40)
    first, second = tiny_swarm.servers
    route, figures, *times = done.err.splitlines()
    assert route == f"route: 0:4 via ...{first.peer_id[-6:]}, 4:8 via ...{second.peer_id[-6:]}"
    assert figures.startswith("40 tokens, ") and "tokens/s" in figures
    steps = re.search(r"^a token took .*\(mean of (\d+)\)", times[0])  # on a busy machine some times come late
    assert steps is not None and 0 < int(steps[1]) <= 39
    assert [line.split()[0] for line in times[2:4]] == ["0:4", "4:8"]
    assert "pushed" in times[3] and "unattributed" in times[4]


def test_json_has_tokens_route_and_figures(
    run_generate: Callable[..., Any], continue_locally: Callable[..., list[int]], tiny_swarm: LocalSwarm
) -> None:
    done = run_generate("--prompt", PROMPT, "--max-new-tokens", 8, "--json", "--no-show-route")
    assert done.code == 0, done.err
    assert "route:" not in done.err
    report = json.loads(done.out)
    assert report["prompt_tokens"] == TOKENS
    assert report["tokens"] == words(report["text"]) == continue_locally(TOKENS, max_new_tokens=8)
    assert report["route"] == [
        {"peer_id": server.peer_id, "blocks": blocks}
        for server, blocks in zip(tiny_swarm.servers, ("0:4", "4:8"), strict=True)
    ]
    assert report["replacements"] == []
    assert report["times"]["steps"] in (6, 7)  # the first server's copy of the last step may still be on its way
    assert [hop["pushed"] for hop in report["times"]["hops"]] == [False, True]
    assert report["tokens_per_second"] > 0 and len(report["token_times"]) == 8


def test_chat_puts_the_prompt_into_the_template(
    run_generate: Callable[..., Any], continue_locally: Callable[..., list[int]]
) -> None:
    done = run_generate("--prompt", "w17 w99", "--chat", "--max-new-tokens", 16)
    assert words(done.out) == continue_locally([1, 17, 99, 3, 2], max_new_tokens=16)


def test_sampling_with_a_seed_is_repeatable(
    run_generate: Callable[..., Any], continue_locally: Callable[..., list[int]]
) -> None:
    sampling = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--seed", 7)
    done = run_generate("--prompt", PROMPT, "--max-new-tokens", 24, *sampling)
    torch.manual_seed(7)
    expected = continue_locally(TOKENS, max_new_tokens=24, do_sample=True, temperature=1.5, top_p=0.9, top_k=50)
    assert words(done.out) == expected != continue_locally(TOKENS, max_new_tokens=24)


def test_the_answer_ends_where_max_length_does(
    run_generate: Callable[..., Any], continue_locally: Callable[..., list[int]]
) -> None:
    done = run_generate("--prompt", PROMPT, "--max-new-tokens", 40, "--max-length", 12)
    assert words(done.out) == continue_locally(TOKENS, max_new_tokens=7)


def test_the_length_of_a_session() -> None:
    assert session_length(10, 64, max_length=None, context=None) == 74
    assert session_length(10, 64, max_length=50, context=2048) == 50
    assert session_length(10, 64, max_length=50, context=30) == 30
    with pytest.raises(SessionTooLong, match=r"the prompt has 50 tokens.*--max-length of 50 tokens"):
        session_length(50, 64, max_length=50, context=2048)
    with pytest.raises(SessionTooLong, match=r"the prompt has 60 tokens.*the model's context of 50 tokens"):
        session_length(60, 64, max_length=None, context=50)


def test_text_streams_in_whole_characters() -> None:
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: bytes(tokens).decode(errors="replace"))
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    answer = "aé€😀".encode() + b"\xff"  # which never becomes a character
    for byte in answer:
        stream.put(torch.tensor([byte]))
    stream.end()
    assert pieces == ["a", "é", "€", "😀", "\N{REPLACEMENT CHARACTER}"]
    assert stream.text == "".join(pieces)
    assert len(stream.times) == len(answer)


def test_replacements_are_told() -> None:
    lost = ChainLink("QmLostLost", BlockSpan(start=4, end=8), "float32")
    found = ChainLink("QmFoundFound", BlockSpan(start=4, end=8), "float32")
    replacement = Replacement(lost, (found,), "it is gone", 17, detected=0.1, routed=0.05, replayed=0.1, time=0.25)
    session: Any = SimpleNamespace(replacements=[replacement])
    figures, line = describe(Answer("w1 w2 w3", [1, 2, 3], [0.5, 1.0, 1.5]), session).splitlines()
    assert figures == "3 tokens, 2.0 tokens/s, the first after 0.50 s"
    assert line == (
        "replaced server ...stLost of blocks 4:8 in 0.25 s (4:8 by ...dFound; 17 tokens replayed): it is gone"
    )


def test_a_model_without_tokenizer_is_named(tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"{tiny_llama_folder} has no tokenizer"):
        load_tokenizer(str(tiny_llama_folder), None)
