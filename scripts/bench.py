"""`swarm bench NAME --json FILE`: what this machine makes of the swarm, each figure beside its local baseline."""

from __future__ import annotations

import typer

from .bench_agreement import agreement
from .bench_churn import churn
from .bench_concurrent import concurrent
from .bench_decode import decode
from .bench_departures import departures
from .bench_failover import failover
from .bench_links import links
from .bench_memory import memory
from .bench_monitor import monitor
from .bench_overcommit import overcommit
from .bench_pets import pets
from .bench_prefill import prefill
from .bench_push import push
from .bench_quantization import quantization
from .bench_routes import routes
from .bench_startup import startup
from .bench_training import training
from .bench_wire import wire

app = typer.Typer(
    help="Measure on this machine, with swarms of its own on loopback. Use an idle machine.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (
    decode,
    concurrent,
    prefill,
    training,
    overcommit,
    failover,
    churn,
    links,
    push,
    routes,
    departures,
    monitor,
    wire,
    quantization,
    memory,
    agreement,
    startup,
    pets,
):
    app.command()(command)
