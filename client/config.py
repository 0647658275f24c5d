"""Everything a user of the client can set, with a unit beside every number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarm.data_structures import AdapterName

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ClientConfig(BaseModel):
    """Settings of one client. Every field is also a keyword of `AutoSwarmModelForCausalLM.from_pretrained`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of live peers, each with its /p2p/ part; any one of them suffices."""

    swarm_key: Path | None = None
    """Key file of a private swarm; all of its peers have the same key. None: the swarm is open to all."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the client's embeddings and head, and of what it sends. "auto": as stored in the checkpoint."""

    device: str = "cpu"
    """Of the client's embeddings and head: "cpu", "cuda" or "cuda:N". What travels is copied from and to it."""

    active_adapter: AdapterName | None = None
    """Of rows of which a call says nothing else; `model.set_adapter` changes it. None: the base model alone."""

    show_route: bool = False
    """Print the chain of servers whenever a session takes or changes it."""

    strict_numerics: bool = False
    """Refuse a replacement server that computes differently (dtype, quantisation, kernels) from the lost one."""

    allowed_servers: frozenset[str] | None = None
    """Use only these peer ids."""

    blocked_servers: frozenset[str] = frozenset()
    """Never use these peer ids."""

    join_timeout: Seconds = 15.0
    """For the first initial peer to answer."""

    update_period: Seconds = 30.0
    """Refresh the picture of the swarm once in this many seconds."""

    connect_timeout: Seconds = 5.0
    """For a server to accept a session."""

    request_timeout: Seconds = 60.0
    """For a server to answer one step, as long as it answers pings. One that hangs is found out sooner."""

    pass_timeout: Seconds = 600.0
    """For a server to run one forward or backward pass of training, waiting behind others included, as long as it
    answers pings."""

    min_patience: Seconds = 0.3
    """A step without news is asked after when it took three times as long as usual, and at least this many seconds."""

    max_patience: Seconds = 5.0
    """A step without news is asked after at the latest after this many seconds."""

    hang_timeout: Seconds = 0.5
    """Then its server must answer a ping within this many seconds, or it is replaced."""

    direct_push: bool = True
    """Let each server send its outputs straight to the next one; the client gets copies. False: through the client."""

    compression: Literal["auto", "none", "blockwise8"] = "auto"
    """How hidden states travel. "auto": "blockwise8" over links that were measured to be slow, "none" elsewhere."""

    ping_timeout: Seconds = 3.0
    """For a server to answer a ping while a chain is chosen."""

    ban_time: Seconds = 15.0
    """A server that failed is left out of new chains for this long; doubles with each failure in a row."""

    max_ban_time: Seconds = 300.0
    """Where the doubling of `ban_time` ends."""

    retry_time: Seconds = 180.0
    """Give up a step that could not be recovered within this many seconds. When all holders of a block die, a swarm
    with spare servers takes one to two minutes to notice, and to load the block elsewhere."""

    max_retries: Annotated[int, Field(ge=0, le=1000)] = 50
    """Give up a step after this many failures."""

    retry_delay: Seconds = 0.5
    """Wait this long before a chain is searched again when none was found; doubles up to `max_retry_delay`."""

    max_retry_delay: Seconds = 5.0
    """Where the doubling of `retry_delay` ends."""

    max_history_bytes: Annotated[int, Field(gt=0)] = 2**30
    """Refuse a session whose input history, kept for fail-over, could grow beyond this many bytes.

    A session keeps at most num_rows * max_length * hidden_size * bytes per value for each server of its chain.
    """
