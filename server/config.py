"""Everything an operator of a server can set, with a unit beside every number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarm.data_structures import BlockSpan

DTypeSetting = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
QuantizationSetting = Literal["auto", "none", "int8", "nf4"]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServerConfig(BaseModel):
    """Settings of one server: `run-server` parses its flags into this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A local folder (config.json, *.safetensors) or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of live peers of the swarm to join; empty starts a new swarm."""

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

    cache_tokens: Annotated[int, Field(ge=1, le=2**30)] = 16_384
    """KV cache budget: tokens of all sessions together, each through the whole span."""

    page_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens per page of the KV cache."""

    max_batch_tokens: Annotated[int, Field(ge=1, le=2**20)] = 1024
    """Tokens in one forward pass; a longer prompt is prefilled in several."""

    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddresses to listen on."""

    announce_maddrs: tuple[str, ...] = ()
    """Multiaddresses that others shall use instead of those that we listen on (behind a NAT or proxy)."""

    identity_path: Path | None = None
    """Private key file; made if absent. It decides the peer id. None: a fresh identity that is not kept."""

    public_name: str = ""
    """Shown to others in the list of servers."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the forward pass. None: let torch decide."""

    announce_period: Seconds = 20.0
    """Renew the announcement once in this many seconds; it expires after three periods."""

    session_idle_limit: Seconds = 600.0
    """A session without a step for this long is closed."""

    drain_time: Seconds = 15.0
    """On SIGTERM: how long running sessions have to move elsewhere."""

    step_timeout: Seconds = 120.0
    """Longest that a step may wait for the device and run."""
