"""`swarm demo`: a swarm of server processes on this machine, one of them killed, the tokens of the whole model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.client.inference_session import InferenceSession

    from .demo_chat import ChatText, Messages
    from .demo_report import AnswerReport, DemoReport
    from .demo_screen import Screen
    from .local_swarm import LocalSwarm

DEMO_MODEL = "SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France, and what is it known for?"
FOLLOW_UP = "Tell me more about that."

#: Tokens of each answer at most.
MAX_TOKENS = (48, 64)

#: In float32 no token depends on which servers compute it, nor on whether they compute it again after a fail-over.
SERVER_FLAGS = ("--dtype", "float32", "--drain-time", "1")


class QuantizationKind(StrEnum):
    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A local folder or a hub id; otherwise {DEMO_MODEL}, prepared on first use.",
            show_default=False,
            metavar="FOLDER_OR_ID",
        ),
    ] = None,
    servers: Annotated[int, typer.Option(max=64, help="Server processes, at least 2.")] = 5,
    prompt: Annotated[str, typer.Option(help="What to ask first.")] = PROMPT,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write what happened to this file.", metavar="FILE", show_default=False),
    ] = None,
    quantization: Annotated[
        QuantizationKind,
        typer.Option(
            help="Of the weights, in the servers and in plain transformers alike. "
            "Only with none do tokens stay the same for certain when a server dies."
        ),
    ] = QuantizationKind.NONE,
) -> None:
    """Start a swarm on this machine, kill a server in the middle of an answer, compare every token.

    Exits 0 only if all tokens equal those of plain transformers although a server of the chain was killed.
    """
    # However we are told to end, our servers end first. After SIGKILL they notice by themselves.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: sys.exit(128 + signum))
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UsageError(f"cannot write {json_file}: there is no folder {json_file.absolute().parent}")
    from .demo_layout import check_num_servers

    check_num_servers(servers)
    _set_up_libraries()
    from .demo_report import DemoReport
    from .demo_screen import Screen

    screen, report = Screen(), DemoReport(model or DEMO_MODEL, quantization.value)
    _Demo(screen, report).run(model, servers, prompt)
    screen.verdict(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if report.failures():
        raise typer.Exit(1)


def _set_up_libraries() -> None:
    """Before they are imported: keep their advice and progress bars off the screen, and choose their threads.

    The servers inherit the environment.
    """
    import logging
    import warnings

    # Half of the cores are as fast as all of them for one token at a time, and leave room for the other processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")


class _Demo:
    """The story: start, answer, answer although a server dies, compare."""

    def __init__(self, screen: Screen, report: DemoReport):
        self._screen = screen
        self._report = report

    def run(self, model: str | None, num_servers: int, prompt: str) -> None:
        source = model or self._prepare_model()
        with ExitStack() as stack:
            swarm, reference = self._start(stack, source, num_servers)
            client, text = self._connect(stack, source, swarm)
            chat = [{"role": "user", "content": prompt}]
            first = self._first_answer(client, text, chat)
            chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": FOLLOW_UP}]
            self._second_answer(client, text, chat, swarm, first.step_seconds)
            with self._report.phase("stop"):
                stack.close()
        self._compare(reference)

    def _prepare_model(self) -> str:
        from .models import demo_model_folder

        status = self._screen.console.status("preparing the model")
        with self._report.phase("prepare"), status:
            return str(demo_model_folder(lambda doing: status.update(f"preparing the model, only this once: {doing}")))

    def _start(self, stack: ExitStack, source: str, num_servers: int) -> tuple[LocalSwarm, Any]:
        """All servers, and beside them the reference model."""
        with self._report.phase("start"):
            from swarm.architectures import num_blocks
            from swarm.checkpoint import open_checkpoint

            from .background import Background
            from .demo_layout import plan_layout
            from .demo_report import ServerReport
            from .demo_screen import ProgressTable
            from .local_swarm import LocalSwarm

            layout = plan_layout(num_blocks(open_checkpoint(source).config), num_servers)
            names = [(f"server {span}", layout.role(index)) for index, span in enumerate(layout.spans)]
            table = ProgressTable([*names, ("plain transformers", "reference")])
            swarm = LocalSwarm(
                source,
                [str(span) for span in layout.spans],
                flags=[*SERVER_FLAGS, "--quantization", self._report.quantization],
                start_timeout=60.0 + 30.0 * num_servers,
                on_progress=lambda index, doing: table.update(index, doing, done=doing == "ready"),
            )

            def load() -> Any:
                table.update(num_servers, "loading")
                from .demo_reference import load_reference

                reference = load_reference(source, self._report.quantization)
                table.update(num_servers, "loaded", done=True)
                return reference

            with self._screen.progress(table):
                # The first server starts alone and leaves a core idle.
                loading = Background(load)
                stack.enter_context(swarm)
                reference = loading.result()
            self._report.servers = [
                ServerReport(
                    server.spec.blocks, layout.role(index), server.peer_id, server.pid, server.seconds_to_ready
                )
                for index, server in enumerate(swarm.servers)
            ]
            return swarm, reference

    def _connect(self, stack: ExitStack, source: str, swarm: LocalSwarm) -> tuple[Any, ChatText]:
        with self._report.phase("connect"), self._screen.console.status("connecting"):
            from swarm.client.model import AutoSwarmModelForCausalLM

            from .demo_chat import ChatText

            client = AutoSwarmModelForCausalLM.from_pretrained(
                source, initial_peers=swarm.initial_peers, dtype="float32"
            )
            stack.callback(client.close)
            text = ChatText(source, client.config.get_text_config().vocab_size)
        if text.note:
            self._screen.say(text.note)
        return client, text

    def _first_answer(self, client: Any, text: ChatText, chat: Messages) -> AnswerReport:
        limits = {"max_new_tokens": MAX_TOKENS[0]}
        with self._report.phase("first answer"), _session(client, text, chat, limits) as session:
            answer = self._answer(client, session, text, chat, limits)
        self._screen.route(answer)
        return answer

    def _second_answer(
        self, client: Any, text: ChatText, chat: Messages, swarm: LocalSwarm, step_seconds: float
    ) -> None:
        """An answer that loses a server on the way."""
        from .demo_kill import ENOUGH_TOKENS, Accident
        from .demo_report import links_of, replacement_reports

        limits = {"min_new_tokens": ENOUGH_TOKENS, "max_new_tokens": MAX_TOKENS[1]}
        with self._report.phase("second answer"), _session(client, text, chat, limits) as session:
            accident = Accident(swarm, session, self._screen, step_seconds)
            answer = self._answer(client, session, text, chat, limits, accident.on_token)
            self._report.killed = accident.report
            self._report.replacements = replacement_reports(session.replacements)
            self._report.final_chain = links_of(session.chain)
        self._screen.route(answer)
        self._screen.failover(self._report)

    def _answer(
        self,
        client: Any,
        session: InferenceSession,
        text: ChatText,
        chat: Messages,
        limits: dict[str, int],
        on_token: Callable[[int], None] = lambda count: None,
    ) -> AnswerReport:
        """Generate and show one answer. limits: keywords of `generate`. on_token: see AnswerStreamer."""
        from .demo_chat import AnswerStreamer
        from .demo_reference import answer_tokens
        from .demo_report import AnswerReport, links_of

        chains = []

        def note_chain(count: int) -> None:
            if count == 1:
                chains.append(links_of(session.chain))
                self._hold_spares_back(client, False)
            on_token(count)

        self._hold_spares_back(client, True)
        prompt_tokens = text.encode(chat)
        self._screen.question(chat[-1]["content"])
        streamer = AnswerStreamer(text, self._screen.write, note_chain)
        tokens = answer_tokens(client, prompt_tokens, limits, streamer)
        answer = AnswerReport(
            question=chat[-1]["content"],
            prompt_tokens=prompt_tokens,
            limits=limits,
            tokens=tokens,
            text=text.decode(tokens),
            chain=chains[0],
            first_token_seconds=streamer.first_token_seconds,
            tokens_per_second=streamer.tokens_per_second,
            longest_pause=streamer.longest_pause,
        )
        self._report.answers.append(answer)
        return answer

    def _hold_spares_back(self, client: Any, hold: bool) -> None:
        """Let a session begin on the main servers, as if the spares had just failed. Ends by itself after a while."""
        router, loop = client.connection.router, client.connection.thread.loop
        tell = router.report_failure if hold else router.report_success
        for server in self._report.servers:
            if server.role == "spare":
                loop.call_soon_threadsafe(tell, server.peer_id)

    def _compare(self, reference: Any) -> None:
        from .demo_reference import answer_tokens

        with self._report.phase("compare"), self._screen.console.status("the same with plain transformers"):
            for answer in self._report.answers:
                answer.compare(answer_tokens(reference, answer.prompt_tokens, answer.limits))


def _session(client: Any, text: ChatText, chat: Messages, limits: dict[str, int]) -> Any:
    return client.inference_session(max_length=len(text.encode(chat)) + limits["max_new_tokens"])
