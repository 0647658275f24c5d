"""What the monitor says about a swarm: the contents of its JSON API, of `swarm health --once --json` and of its page.

Made from a picture by `summary.summarize`. Units: seconds, tokens, tokens/s, bytes/s; points in time are Unix time.
Names and texts in here come from strangers: whoever shows them must escape them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from swarm.data_structures import Frozen, PeerName, ServerState

Blocks = Annotated[tuple[int, int], Field(description="First block, and the one after the last.")]
Seconds = Annotated[float, Field(ge=0, description="Seconds.")]
Moment = Annotated[float, Field(ge=0, description="Unix time in seconds.")]
Way = Literal["direct", "relay"]
ReachabilityStep = Literal["find", "relay", "dial", "handshake", "answer"]


class HopReport(Frozen):
    """One server of a chain. seconds: predicted, of a token: from the server before it, and inside."""

    peer_id: str
    blocks: Blocks
    seconds: Seconds


class ChainReport(Frozen):
    """The chain that a client beside the monitor would take for one row.

    step_time: predicted seconds of a token, embeddings and head aside. tokens_per_second: 1 / step_time.
    correction: what routing's own predictions for this model are multiplied by here and in every `Departure`, as test
    requests of late showed; None: there were none.
    """

    hops: tuple[HopReport, ...]
    step_time: Seconds
    tokens_per_second: float
    correction: float | None


class Departure(Frozen):
    """What happens to the model if this server leaves.

    lost_blocks: that nobody else holds. step_time: predicted seconds of a token through the best chain of the others;
    None if they make none.
    """

    lost_blocks: tuple[int, ...]
    step_time: Seconds | None


class AdapterReport(Frozen):
    """An adapter of a server. kind: such as "lora". digest: equal ones are the same adapter."""

    name: str
    kind: str
    digest: str


class ServerReport(Frozen):
    """One server: what it announces, and what the monitor measured.

    span: its blocks. state: as announced. answers: whether it answered when it was asked last; None: not asked yet.
    serving: it is online and answers; others serve nobody here.
    dtype, quantization, device: read from its numerics tag; None if that tells nothing.
    throughput: tokens/s of one row through its whole span. decode_times: seconds of a step there, by number of rows.
    forward_rate: tokens/s of prompts. network_rate: bytes/s.
    running_rows, waiting_rows: on the device, and before it. session_rows: of all open sessions.
    cache_tokens, cache_tokens_left: of sessions in all, and of new ones.
    relayed: reached through `relays` only. fixed: it never takes other blocks by itself.
    round_trip: seconds from the monitor. links: seconds of round trip to servers of the next block, by peer id; the
    shortest of them, see `summary.MOST_LINKS`.
    started_at, announced_at: of its process, and of what is said here. expires_at: of its record.
    addresses: only if the monitor was told to show them.
    departure: only of one that serves, and of so many as can be worked out in time, see `outlook.MOST_SEARCHED`.
    """

    peer_id: str
    public_name: str
    software: str
    span: Blocks
    state: ServerState
    answers: bool | None
    serving: bool
    dtype: str | None
    quantization: str | None
    device: str | None
    numerics: str
    throughput: float
    decode_times: dict[str, float]
    forward_rate: float | None
    network_rate: float | None
    running_rows: int
    waiting_rows: int
    session_rows: int
    cache_tokens: int | None
    cache_tokens_left: int
    adapters: tuple[AdapterReport, ...]
    fetches_adapters: bool
    relayed: bool
    relays: tuple[str, ...]
    fixed: bool
    round_trip: Seconds | None
    links: dict[str, float]
    started_at: Moment | None
    announced_at: Moment | None
    expires_at: Moment
    addresses: tuple[str, ...] | None
    departure: Departure | None


class ModelOverview(Frozen):
    """One model.

    replicas: for each block, how many serving servers hold it. missing_blocks: that none holds.
    weakest_blocks: those with fewest replicas. best_chain: None if there is none, or if so many models are announced
    that chains are searched only for those that most servers serve.
    """

    name: str
    fingerprint: str
    num_blocks: int
    hidden_size: int
    complete: bool
    missing_blocks: tuple[int, ...]
    weakest_blocks: tuple[int, ...]
    replicas: tuple[int, ...]
    best_chain: ChainReport | None


class ModelReport(ModelOverview):
    """One model and its servers: those in any state, sorted by span and peer id."""

    servers: tuple[ServerReport, ...]


class SwarmReport(Frozen):
    """A swarm as the monitor sees it.

    healthy: no problems. problems: sentences: models that are incomplete, or absent though asked for.
    trouble: why the picture is old, in a sentence; None: it is fresh.
    revision: grows with every change. made_at: of the picture. read_at: when the records were read last.
    """

    healthy: bool
    problems: tuple[str, ...]
    trouble: str | None
    revision: int
    made_at: Moment
    read_at: Moment
    models: tuple[ModelReport, ...]


class TraceRequest(Frozen):
    """A test request: random hidden states, so neither a prompt nor weights are needed.

    model: its name, or the start of its fingerprint. peers: the chain to take, in order; None: the best one.
    prompt_tokens: of the first step. new_tokens: steps of one token that follow it.
    """

    model: Annotated[str, Field(min_length=1, max_length=128)]
    peers: Annotated[tuple[PeerName, ...], Field(min_length=1, max_length=256)] | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=512)] = 16
    new_tokens: Annotated[int, Field(ge=1, le=32)] = 8


class TracedHop(Frozen):
    """What one server took of one step, in seconds: see `swarm.client.timeline.HopTimes`."""

    peer_id: str
    public_name: str
    blocks: Blocks
    pushed: bool
    network: float
    queued: float
    computed: float
    codec: float
    other: float


class TracedStep(Frozen):
    """One step, or the mean of several. total, and the monitor's own part of it in `codec`: seconds."""

    total: Seconds
    codec: Seconds
    hops: tuple[TracedHop, ...]


class TraceReport(Frozen):
    """Where the time of a test request went.

    connect_time: to find the chain and open the session. prompt: the first step. token: the mean of the later ones.
    step_times: of each of those, in seconds. time_to_first_token: connect_time and the prompt.
    time_per_output_token: the median of step_times. predicted_step_time: what was expected of it.
    """

    model: str
    fingerprint: str
    made_at: Moment
    prompt_tokens: int
    connect_time: Seconds
    prompt: TracedStep
    token: TracedStep
    step_times: tuple[float, ...]
    time_to_first_token: Seconds
    time_per_output_token: Seconds
    predicted_step_time: Seconds | None


class ReachabilityReport(Frozen):
    """Whether a peer can be reached from the monitor.

    way: directly or through a relay; None: not at all. round_trip: seconds.
    step: at which step it failed: find, relay, dial, handshake or answer. reason: in a sentence, with what to try.
    """

    peer_id: str
    reachable: bool
    way: Way | None
    round_trip: Seconds | None
    step: ReachabilityStep | None
    reason: str | None


class ErrorReport(Frozen):
    """Why the monitor does not do what was asked. detail: a sentence."""

    detail: str
