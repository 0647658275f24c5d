"""Everything an operator of a server can set, with a unit beside every number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from swarm.data_structures import BlockSpan, RelayMode
from swarm.passes import MAX_PASS_TOKENS
from swarm.routing.rebalancing import RebalancingPolicy

from .eviction import EvictionLimits
from .quotas import QuotaLimits

DTypeSetting = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
QuantizationSetting = Literal["auto", "none", "int8", "nf4"]
Seconds = Annotated[float, Field(gt=0, le=86_400)]

#: Of `ServerConfig.max_stall`.
DEFAULT_MAX_STALL = 3.0


def _read_size(value: Any, read: ValidatorFunctionWrapHandler) -> ByteSize:
    """What the library makes of it, with an error that says what to write."""
    try:
        if isinstance(value, str) and not re.fullmatch(r"\s*\d*\.?\d+\s*[A-Za-z]*\s*", value):
            raise ValueError("the library would read only the beginning")
        size: ByteSize = read(value)
    except ValueError as error:
        raise ValueError(f"cannot read {value!r} as an amount of memory; write for example 8GB or 512MiB") from error
    if size < 1:
        raise ValueError("must be more than nothing")
    return size


MemorySize = Annotated[ByteSize, WrapValidator(_read_size)]


class ServerConfig(BaseModel):
    """Settings of one server: `run-server` parses its flags into this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A local folder (config.json, *.safetensors) or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of live peers of the swarm to join; empty starts a new swarm."""

    swarm_key: Path | None = None
    """Key file of a private swarm; all of its peers have the same key. None: the swarm is open to all."""

    blocks: BlockSpan | None = None
    """Serve exactly these blocks."""

    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """Serve this many blocks, where the swarm needs them most."""

    device: str = "cpu"
    """Where the blocks live: "cpu", "cuda", "cuda:1"."""

    dtype: DTypeSetting = "auto"
    """Of activations and unquantised weights. "auto": bfloat16 where the device has it, else as stored."""

    quantization: QuantizationSetting = "auto"
    """Of the linear layers' weights, by bitsandbytes as they load. "auto": NF4 on CUDA, none on a CPU."""

    max_memory: MemorySize | None = None
    """Bytes of the device's memory for blocks, KV cache and activations together, as a number or "8GB", "512MiB".
    On a CPU, Python and its libraries take about half a gigabyte besides. None: what is free."""

    cache_tokens: Annotated[int, Field(ge=1, le=2**30)] | None = None
    """KV cache budget: tokens of all sessions together, each through the whole span. None: derived from the memory."""

    cache_overcommit: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """All sessions together may reserve this many times `cache_tokens`, as few reach their declared length.

    Above 1, sessions are evicted when pages run out after all; their clients replay them.
    """

    idle_protection: Seconds = EvictionLimits.idle_protection
    """With `cache_overcommit`: a session that stepped within this many seconds is not evicted as idle."""

    turn_time: Seconds = EvictionLimits.turn_time
    """With `cache_overcommit`, while more sessions are active than fit: how long a step waits before a session that
    has held cache for as long is evicted for it."""

    replay_share: Annotated[float, Field(gt=0, le=1)] = EvictionLimits.replay_share
    """With `cache_overcommit`: part of the server's time that replays may take of sessions whose turn was over.
    Where that is too little for turns of `turn_time`, turns are longer."""

    page_wait_limit: Seconds = EvictionLimits.page_wait_limit
    """With `cache_overcommit`: a step that waited for cache this long is refused. Below clients' `request_timeout`."""

    page_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens per page of the KV cache."""

    max_batch_tokens: Annotated[int, Field(ge=1, le=2**20)] = 1024
    """Tokens in one forward pass; a longer prompt is prefilled in several."""

    max_pass_tokens: Annotated[int, Field(ge=MAX_PASS_TOKENS, le=2**20)] = 4096
    """Tokens in one forward or backward pass for training; more are refused. Clients send up to 1,024 without asking.
    About 512 run at a time, or one longer sequence: that holds sessions up for as long as a block takes for it, and a
    backward pass keeps its activations."""

    max_stall: Annotated[float, Field(ge=0, le=1e6)] = DEFAULT_MAX_STALL
    """While a prompt is prefilled, the gaps between other sessions' tokens grow to about this many times the usual:
    prompts run in chunks of the size that allows it. 0: no limit, so always up to `max_batch_tokens` at once."""

    adapters: tuple[str, ...] = ()
    """Adapters to serve: FOLDER, NAME=FOLDER, a folder of such folders (looked through again and again), or hub ids."""

    adapters_from_hub: bool = False
    """Load an adapter from the hub when somebody asks for it."""

    adapter_memory: MemorySize = ByteSize(2**30)
    """Bytes of the device's memory for adapters, as a number or "1GB"; those that nobody uses make room for others.
    While they are in a batch, their tensors lie in memory twice."""

    max_adapter_size: MemorySize = ByteSize(2**29)
    """Bytes of one adapter's weights, as a file; larger ones are refused."""

    adapter_scan_period: Seconds = 10.0
    """Look through folders of adapters once in this many seconds."""

    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddresses to listen on."""

    announce_maddrs: tuple[str, ...] = ()
    """Multiaddresses that others shall use instead of those that we listen on (behind a NAT or proxy)."""

    listen: bool = True
    """Accept connections. Without it others reach this server through relays only."""

    relay: RelayMode = "auto"
    """Whether others reach this server through relays: "auto" if peers of the swarm say that they cannot call it back.
    One that starts a swarm has nobody to ask and needs none."""

    serve_relay: bool = True
    """If this server is reached directly, carry connections to those that are not. Costs line and a little CPU."""

    identity_path: Path | None = None
    """Private key file; made if absent. It decides the peer id. None: a fresh identity that is not kept."""

    public_name: str = ""
    """Shown to others in the list of servers."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the forward pass. None: let torch decide."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Show figures for Prometheus at this TCP port, 0: any free one. None: nowhere."""

    metrics_host: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address of this machine to listen on for those who ask for the figures. They tell no names, but how busy this
    server is: beyond the machine itself, let a firewall decide who may ask."""

    announce_period: Seconds = 20.0
    """Renew the announcement once in this many seconds; it expires after three periods."""

    rebalance_period: Annotated[float, Field(ge=0, le=86_400)] = RebalancingPolicy.check_period
    """Ask once in about this many seconds whether the swarm would gain if this server took other blocks, and then do
    that. 0: never. Servers with `blocks` of their owner's choice never move."""

    move_delay: Seconds = 10.0
    """Seconds between the announcement of a move and the move, for others to read it."""

    session_idle_limit: Seconds = 600.0
    """A session without a step for this long is closed."""

    max_sessions_per_peer: Annotated[int, Field(ge=1, le=2**20)] = QuotaLimits.max_sessions
    """Sessions that one peer may have open at once; it is refused more."""

    max_streams_per_peer: Annotated[int, Field(ge=1, le=2**20)] = QuotaLimits.max_streams
    """Streams that one peer may have open at once: one for each session, besides those that it pushes over."""

    max_kept_bytes_per_peer: MemorySize = ByteSize(QuotaLimits.max_kept_bytes)
    """Bytes of deep prompts, in float32, that one peer's sessions may keep here, as a number or "128MiB", and that one
    pass for training may bring; it is refused more."""

    max_bytes_in_flight_per_peer: MemorySize = ByteSize(QuotaLimits.max_bytes_in_flight)
    """Bytes of one peer's tensors that are read, computed on or answered, as a number or "128MiB". What goes beyond is
    not read until there is room."""

    requests_per_second_per_peer: Annotated[float, Field(gt=0, le=1e9)] = QuotaLimits.requests_per_second
    """Requests that one peer may make in a second, in the long run; more are read later."""

    request_burst_per_peer: Annotated[int, Field(ge=1, le=10**9)] = QuotaLimits.request_burst
    """Requests that one peer may make at once after a pause."""

    drain_time: Seconds = 15.0
    """On SIGTERM: how long running sessions have to move elsewhere."""

    step_timeout: Seconds = 120.0
    """Longest that a step may wait for the device and run."""

    pass_timeout: Seconds = 600.0
    """Longest that a pass for training may wait for the device and run."""

    @property
    def takes_adapters(self) -> bool:
        return bool(self.adapters) or self.adapters_from_hub

    @property
    def quota_limits(self) -> QuotaLimits:
        """What each peer may take."""
        return QuotaLimits(
            max_sessions=self.max_sessions_per_peer,
            max_streams=self.max_streams_per_peer,
            max_kept_bytes=self.max_kept_bytes_per_peer,
            max_bytes_in_flight=self.max_bytes_in_flight_per_peer,
            requests_per_second=self.requests_per_second_per_peer,
            request_burst=self.request_burst_per_peer,
        )
