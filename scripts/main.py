"""The `swarm` command: a table of subcommands, each imported when it runs and not before.

Errors for users end here: one line on stderr, never a traceback (SWARM_DEBUG=1 shows it).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
import typer.core
import typer.main

from swarm import __version__
from swarm.errors import SwarmError, UsageError

from .leaving import end_with
from .logs import one_line, say_error
from .options import spread_addresses


class Subcommand(NamedTuple):
    """Where a subcommand lives: `attribute` of `module` is a function with typer annotations, or a typer.Typer."""

    module: str
    attribute: str
    help: str


SUBCOMMANDS = {
    "run-server": Subcommand("swarm.scripts.run_server", "run_server", "Serve a span of a model's blocks."),
    "run-bootstrap": Subcommand(
        "swarm.scripts.run_bootstrap", "run_bootstrap", "Run a peer without blocks that others join the swarm through."
    ),
    "generate": Subcommand("swarm.scripts.generate", "generate", "Complete a prompt over the swarm."),
    "chat": Subcommand("swarm.scripts.chat", "chat", "Chat with a model over the swarm."),
    "health": Subcommand(
        "swarm.scripts.health", "health", "Show models, blocks and servers of a swarm: a web page, tables or JSON."
    ),
    "models": Subcommand(
        "swarm.scripts.list_models", "list_models", "List the models of a swarm, and whether each is complete."
    ),
    "adapters": Subcommand("swarm.scripts.adapters", "adapters", "List the adapters that the servers of a model have."),
    "servers": Subcommand("swarm.scripts.servers", "servers", "List the servers that you run on this machine."),
    "pause": Subcommand(
        "swarm.scripts.pause", "pause", "Unload a server of yours, to have the machine back for a while."
    ),
    "resume": Subcommand("swarm.scripts.pause", "resume", "Let a paused server of yours serve again."),
    "make-key": Subcommand("swarm.scripts.make_key", "make_key", "Make the key of a private swarm."),
    "demo": Subcommand(
        "swarm.scripts.demo", "demo", "Start a swarm on this machine, kill a server, compare every token."
    ),
    "bench": Subcommand("swarm.scripts.bench", "app", "Measure against plain transformers on this machine."),
    "simulate": Subcommand(
        "swarm.scripts.simulate", "simulate", "Thousands of servers in virtual time, by the real decisions."
    ),
    "check-device": Subcommand(
        "swarm.scripts.check_device",
        "check_device",
        "Compare a swarm on this machine's device with plain transformers.",
    ),
    "convert": Subcommand("swarm.scripts.convert", "convert", "Turn a GGUF file into a folder that can be served."),
}


def load(name: str) -> Any:
    """The real command behind a line of the table; importing it may take seconds."""
    subcommand = SUBCOMMANDS[name]
    command = getattr(importlib.import_module(subcommand.module), subcommand.attribute)
    if isinstance(command, typer.Typer):
        return typer.main.get_group(command)
    single = typer.Typer(add_completion=False)
    single.command(name)(command)
    return typer.main.get_command(single)


class LazyGroup(typer.core.TyperGroup):
    """Lists, completes and suggests subcommands by their placeholders; resolving one imports the real thing."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, placeholder if name is None else load(name), rest


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"petswarm {__version__}")
        raise typer.Exit


def build_app() -> Any:
    """The `swarm` command with a placeholder for each line of the table."""
    app = typer.Typer(
        cls=LazyGroup,
        help="Run and fine-tune large language models over a swarm of machines.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def swarm(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    def placeholder() -> None:
        pass

    for name, subcommand in SUBCOMMANDS.items():
        app.command(name, help=subcommand.help)(placeholder)
    return typer.main.get_command(app)


def report(run: Callable[[], Any]) -> int:
    """Run a command; an error meant for users becomes one line on stderr. Returns the exit code."""
    try:
        run()
    except SwarmError as error:
        if os.environ.get("SWARM_DEBUG") == "1":
            raise
        say_error(one_line(error))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Run `swarm ARGS...` (default: this process's arguments) and exit."""
    app = build_app()
    given = spread_addresses(sys.argv[1:] if args is None else args)
    sys.exit(report(lambda: app.main(args=given, prog_name="swarm")))


def swarm_command() -> NoReturn:
    """The process of `swarm ARGS...`."""
    end_with(main)


def run_server_command() -> NoReturn:
    """`run-server ARGS...` is `swarm run-server ARGS...`."""
    end_with(lambda: main(["run-server", *sys.argv[1:]]))


if __name__ == "__main__":
    swarm_command()
