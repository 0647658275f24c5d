"""What one run of the demo showed: the verdict, and the same as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client.failover import Replacement
    from swarm.routing.chain import Chain
    from swarm.server.config import Quantization


@dataclass(frozen=True)
class Link:
    """One server's part of a chain. blocks: the part that it serves there, "A:B"."""

    peer_id: str
    blocks: str


def links_of(chain: Chain) -> list[Link]:
    return [Link(link.peer_id, str(link.span)) for link in chain]


@dataclass
class ServerReport:
    blocks: str
    role: str
    peer_id: str
    pid: int
    seconds_to_ready: float


@dataclass
class AnswerReport:
    """One generation.

    chain: as it was when the first token came. limits: keywords of `generate`. longest_pause: seconds between two
    tokens. expected: the tokens of plain transformers.
    """

    question: str
    prompt_tokens: list[int]
    limits: dict[str, int]
    tokens: list[int]
    text: str
    chain: list[Link]
    first_token_seconds: float
    tokens_per_second: float
    longest_pause: float
    expected: list[int] = field(default_factory=list)
    equal: bool = False

    @property
    def step_seconds(self) -> float:
        return 1.0 / self.tokens_per_second if self.tokens_per_second else 0.0

    def compare(self, expected: list[int]) -> None:
        self.expected = expected
        self.equal = self.tokens == expected

    def difference(self) -> str:
        """The first token that is not as expected, in words."""
        for index, (got, wanted) in enumerate(zip(self.tokens, self.expected, strict=False)):
            if got != wanted:
                return f"token {index + 1} is {got}, plain transformers says {wanted}"
        return f"there are {len(self.tokens)} tokens, plain transformers gives {len(self.expected)}"


@dataclass
class KillReport:
    """after_tokens: how many tokens the answer had. chain: at that moment. exit_code: -9 after SIGKILL."""

    peer_id: str
    pid: int
    blocks: str
    after_tokens: int
    chain: list[Link]
    exit_code: int | None = None

    @property
    def in_chain(self) -> bool:
        return any(link.peer_id == self.peer_id for link in self.chain)


@dataclass
class ReplacementReport:
    """One fail-over. seconds: to find, open and refill the servers that took over."""

    lost: Link
    found: list[Link]
    reason: str
    replayed_tokens: int
    seconds: float


def replacement_reports(replacements: Sequence[Replacement]) -> list[ReplacementReport]:
    return [
        ReplacementReport(
            lost=links_of((replacement.lost,))[0],
            found=links_of(replacement.found),
            reason=replacement.reason,
            replayed_tokens=replacement.replayed_tokens,
            seconds=replacement.time,
        )
        for replacement in replacements
    ]


@dataclass
class DemoReport:
    """What the whole run showed. final_chain: at the end of the second answer. seconds: of each phase, and in total."""

    model: str
    quantization: Quantization
    servers: list[ServerReport] = field(default_factory=list)
    answers: list[AnswerReport] = field(default_factory=list)
    killed: KillReport | None = None
    replacements: list[ReplacementReport] = field(default_factory=list)
    final_chain: list[Link] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self.seconds[name] = now - began
            self.seconds["total"] = now - self.started

    def failures(self) -> list[str]:
        """What did not go as it must, one line each; empty if the demo passed."""
        failures = [
            f"answer {number} differs: {answer.difference()}"
            for number, answer in enumerate(self.answers, 1)
            if not answer.equal
        ]
        if len(self.answers) != 2:
            failures.append(f"there were {len(self.answers)} answers instead of 2")
        if self.killed is None:
            return [*failures, "no server was killed"]
        if not self.killed.in_chain:
            failures.append(f"the killed server of blocks {self.killed.blocks} was not in the chain")
        if self.killed.exit_code != -9:
            failures.append(f"the killed server ended with exit code {self.killed.exit_code}, not by SIGKILL")
        if not any(
            replacement.lost.peer_id == self.killed.peer_id and replacement.replayed_tokens > 0
            for replacement in self.replacements
        ):
            failures.append("no history was replayed in the place of the killed server")
        return failures

    def to_json(self) -> dict[str, Any]:
        failures = self.failures()
        data = asdict(self)
        del data["started"]
        if self.killed is not None:
            data["killed"]["in_chain"] = self.killed.in_chain
        return {"passed": not failures, "failures": failures, **data}
