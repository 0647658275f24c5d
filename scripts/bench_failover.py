"""`swarm bench failover`: servers in use are killed at random moments, again and again, while a client generates.

Every block has spares, and every server that was killed is followed by a new one, so that a client always finds the way
on. A round is one session: a prompt, some tokens, and one kill of a server of its chain. The stall is what the token
that it hit took longer than usual. Beside it stands what a client without histories would do: a session of its own for
the prompt and all tokens so far, up to the next token.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_attack import Attack, Stamps, Way
from .bench_decode import even_spans, load_local
from .bench_report import DType, JsonFile, Model, Precision, Report, ServerThreads, run_benchmark
from .local_swarm import LocalSwarm, ServerSpec

if TYPE_CHECKING:
    import torch

    from .local_swarm import ServerProcess

#: Tokens before the earliest kill, from which the usual gap between tokens is known.
CALM_TOKENS = 5
#: Tokens in which the kill may fall, and as many after those.
HIT_TOKENS = 5
NEW_TOKENS = CALM_TOKENS + 2 * HIT_TOKENS
#: One kill in so many falls into the prompt.
PROMPT_SHARE = 5
#: One round in so many is followed by a restart from scratch.
RESTART_SHARE = 4
#: Of other sessions of the same prompt, for the usual time of a first token.
CALM_ROUNDS = 3


def failover(
    model: Model = None,
    kills: Annotated[int, typer.Option(min=0, help="Servers killed by SIGKILL.")] = 100,
    stops: Annotated[int, typer.Option(min=0, help="Servers stopped by SIGSTOP.")] = 24,
    contexts: Annotated[list[int], typer.Option(min=2, help="Prompt tokens, in turn; give it several times.")] = [  # noqa: B006
        64,
        512,
        1024,
    ],
    servers: Annotated[int, typer.Option(min=1, help="In the chain.")] = 3,
    replicas: Annotated[int, typer.Option(min=2, help="Servers of each part of the chain.")] = 2,
    seed: Annotated[int, typer.Option(help="Of victims and moments.")] = 0,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Stalls by kills at random moments, what they consist of, and restarts from scratch beside them."""
    run_benchmark(
        measure,
        model,
        json_file,
        kills=kills,
        stops=stops,
        contexts=contexts,
        num_servers=servers,
        replicas=replicas,
        seed=seed,
        dtype=dtype.value,
        server_threads=server_threads,
    )


@dataclass(frozen=True)
class Round:
    """One session and its kill, in seconds. In the JSON, each is a record.

    hop: which server of the chain it hit, from 0; None: the session was over first.
    stall: of the token that the kill hit, beyond what it usually takes. detect, route, replay, replayed_tokens: see
    `failover.Replacement`, summed over all servers that were `replaced`. token: the usual gap between two tokens.
    hit: the server that was killed is one of those. same: the tokens are those of plain transformers.
    """

    way: Way
    context: int
    in_prompt: bool
    hop: int | None
    stall: float
    detect: float
    route: float
    replay: float
    replayed_tokens: int
    replaced: int
    token: float
    hit: bool
    same: bool


def measure(
    model: str,
    *,
    kills: int,
    stops: int,
    contexts: Sequence[int],
    num_servers: int,
    replicas: int,
    seed: int,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. An error of the client ends a round, not the benchmark."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate, random_prompt, threads

    checkpoint = open_checkpoint(model)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "kills": kills,
        "stops": stops,
        "contexts": ", ".join(map(str, contexts)),
        "servers": num_servers,
        "replicas": replicas,
        "new_tokens": NEW_TOKENS,
        "seed": seed,
        "server_threads": server_threads,
    }
    report = Report("failover", settings)
    prompts = {context: random_prompt(checkpoint.config, context) for context in contexts}
    progress("computing what is right")
    local = load_local(checkpoint, dtype)
    with threads(1):
        expected = {context: generate(local, prompt, NEW_TOKENS).tokens for context, prompt in prompts.items()}
    del local
    spans = [str(span) for span in even_spans(num_blocks(checkpoint.config), num_servers)]
    with ExitStack() as stack:
        progress(f"starting {num_servers} x {replicas} servers")
        flags = ["--dtype", dtype, "--threads", str(server_threads)]
        swarm = stack.enter_context(LocalSwarm(model, spans * replicas, flags=flags))
        remote = stack.enter_context(client(model, swarm.initial_peers, dtype))
        stack.enter_context(threads(1))
        scene = _Scene(swarm, remote, prompts, expected, random.Random(seed), progress)
        scene.run([Way.KILL] * kills + [Way.STOP] * stops)
    _summarize(report, scene)
    return report


@dataclass
class _Scene:
    """The swarm and what happens in it. first_tokens: seconds of undisturbed first tokens, by context; restarts: of
    restarts from scratch."""

    swarm: LocalSwarm
    remote: Any
    prompts: dict[int, torch.Tensor]
    expected: dict[int, list[int]]
    random: random.Random
    progress: Callable[[str], None]
    rounds: list[Round] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    first_tokens: dict[int, list[float]] = field(default_factory=dict)
    restarts: dict[int, list[float]] = field(default_factory=dict)

    def run(self, ways: Sequence[Way]) -> None:
        from swarm.errors import SwarmError

        for context in self.prompts:
            self.progress(f"undisturbed sessions of {context} tokens")
            self._first_token(context, [])  # warms up
            self.first_tokens[context] = [self._first_token(context, []) for _ in range(CALM_ROUNDS)]
            self.restarts[context] = []
        for number, way in enumerate(ways):
            context = list(self.prompts)[number % len(self.prompts)]
            self.progress(f"{way} {number + 1} of {len(ways)}, after {context} tokens")
            try:
                self.rounds.append(self._round(way, context, in_prompt=number % PROMPT_SHARE == PROMPT_SHARE - 1))
            except SwarmError as error:
                self.errors.append(f"{way} after {context} tokens: {error}")
            if number // len(self.prompts) % RESTART_SHARE == 0:
                self.restarts[context].append(self._first_token(context, self.expected[context][:CALM_TOKENS]))

    def _first_token(self, context: int, tokens: Sequence[int]) -> float:
        """Seconds from nothing to the token that follows the prompt and these tokens."""
        import torch

        from .bench_generation import generate_remotely

        text = torch.cat([self.prompts[context], torch.tensor([list(tokens)], dtype=torch.int64)], dim=1)
        return generate_remotely(self.remote, text, 2).first

    def _round(self, way: Way, context: int, *, in_prompt: bool) -> Round:
        """One session with one kill. Raises SwarmError if the client gives up."""
        import torch

        prompt, usual_first = self.prompts[context], statistics.median(self.first_tokens[context])
        with self.remote.inference_session(max_length=context + NEW_TOKENS) as session:
            attack = Attack(self.swarm, session, way, self.random)
            stamps = Stamps(CALM_TOKENS, lambda: None if in_prompt else attack.start(HIT_TOKENS * stamps.usual_gap))
            if in_prompt:
                attack.start(usual_first)
            try:
                with torch.inference_mode():
                    output = self.remote.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=NEW_TOKENS,
                        do_sample=False,
                        streamer=stamps,
                    )
            finally:
                victim = attack.end()
                if victim is not None:
                    self._replace(victim)
            lost = session.replacements
        return Round(
            way,
            context,
            in_prompt,
            attack.hop,
            stall=stamps.longest_delay(attack.at, usual_first),
            detect=sum(replacement.detected for replacement in lost),
            route=sum(replacement.routed for replacement in lost),
            replay=sum(replacement.replayed for replacement in lost),
            replayed_tokens=sum(replacement.replayed_tokens for replacement in lost),
            replaced=len(lost),
            token=stamps.usual_gap,
            hit=victim is not None and any(replacement.lost.peer_id == victim.peer_id for replacement in lost),
            same=output[0, context:].tolist() == self.expected[context],
        )

    def _replace(self, victim: ServerProcess) -> None:
        victim.kill()  # it may only have been stopped
        self.swarm.add(ServerSpec(victim.spec.blocks))


def _summarize(report: Report, scene: _Scene) -> None:
    """Figures by way and context, prompts apart; goals are about all kills of a way."""
    report.records = [asdict(found) for found in scene.rounds]
    for context, seconds in scene.first_tokens.items():
        report.add(f"{context} tokens: undisturbed first token", "s", seconds)
    for way in Way:
        rounds = [found for found in scene.rounds if found.way is way]
        if not rounds:
            continue
        for context in scene.first_tokens:
            for in_prompt in (False, True):
                part = [found for found in rounds if (found.context, found.in_prompt) == (context, in_prompt)]
                _add_part(report, f"{way}, {context} tokens{', in the prompt' if in_prompt else ''}", part)
        beyond = [found.stall - found.replay for found in rounds]
        report.add(f"{way}: stall beyond replay", "s", beyond)
        report.add(f"{way}: stall beyond replay, 95th percentile", "s", [percentile(beyond, 95)])
        report.add(f"{way}: usual token", "s", [found.token for found in rounds])
    for context, seconds in scene.restarts.items():
        if seconds:
            report.add(f"{context} tokens: restart from scratch", "s", seconds)
    tried = len(scene.rounds) + len(scene.errors)
    if tried:
        report.ratios["completed"] = len(scene.rounds) / tried
        report.ratios["identical tokens"] = sum(found.same for found in scene.rounds) / tried
        report.ratios["hit a server in use"] = sum(found.hit for found in scene.rounds) / tried
    report.settings["errors"] = "; ".join(scene.errors) or "none"


def _add_part(report: Report, name: str, rounds: Sequence[Round]) -> None:
    if not rounds:
        return
    report.add(f"{name}: stall", "s", [found.stall for found in rounds])
    report.add(f"{name}: stall, 95th percentile", "s", [percentile([found.stall for found in rounds], 95)])
    for kind in ("detect", "route", "replay"):
        report.add(f"{name}: {kind}", "s", [getattr(found, kind) for found in rounds])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
