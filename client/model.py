"""The model a user holds: the Hugging Face model whose blocks run in the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from transformers import GenerationConfig, PretrainedConfig

from swarm.architectures import Architecture, architecture_of, client_config, client_tensors, num_blocks
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.dht import Directory
from swarm.errors import NotSupported, UsageError
from swarm.node import NodeConfig, NodeThread
from swarm.protocol import explain
from swarm.quiet import quiet_loading
from swarm.routing.router import Router, RouterConfig
from swarm.rpc import timed_info, upload_rate
from swarm.tensors import DTYPES

from .block_client import SwarmBlockClient
from .config import ClientConfig
from .few_rows import speed_up_few_rows
from .inference_session import InferenceSession
from .links import Links, keep_measuring
from .remote_blocks import MASK_NAME, RemoteBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SwarmConnection:
    """A client's place in the swarm: its node, its picture of the servers, and the model they serve."""

    def __init__(self, checkpoint: Checkpoint, config: ClientConfig):
        self.config = config
        self.num_blocks = num_blocks(checkpoint.config)
        fingerprint = checkpoint.fingerprint()
        self.thread = NodeThread.start(
            NodeConfig(initial_peers=config.initial_peers, listen=False, join_timeout=config.join_timeout)
        )
        try:
            node = self.thread.node
            self.router = Router(
                directory=Directory(node),
                ask=lambda peer_id, timeout, opening_key: timed_info(node.p2p, peer_id, timeout, opening_key),
                fingerprint=fingerprint,
                num_blocks=self.num_blocks,
                model_name=checkpoint.name,
                config=RouterConfig(**config.model_dump(include=set(RouterConfig.model_fields))),
            )
            self.client = SwarmBlockClient(node, fingerprint, config)
            self.links = Links(self.router, config)
            self.thread.run(self.router.check_served())
            if config.compression == "auto":
                asyncio.run_coroutine_threadsafe(self._measure_line(), self.thread.loop)
        except BaseException:
            self.thread.stop()
            raise

    async def _measure_line(self) -> None:
        """In the background, while the model loads and as long as the connection lives."""
        p2p = self.thread.node.p2p
        await keep_measuring(
            self.links,
            lambda: [record.peer_id for record in self.router.snapshot().servers],
            lambda peer_id: upload_rate(p2p, peer_id, self.config.connect_timeout),
        )

    def open_session(self, span: BlockSpan, num_rows: int, max_length: int, bytes_per_token: int) -> InferenceSession:
        return InferenceSession(
            self.thread,
            self.router,
            self.client,
            self.config,
            self.links,
            span=span,
            num_rows=num_rows,
            max_length=max_length,
            bytes_per_token=bytes_per_token,
        )


class SwarmModelMixin:
    """What a causal language model gains when its blocks move to the swarm. Mixed into the model's own class."""

    connection: SwarmConnection
    config: PretrainedConfig
    dtype: torch.dtype

    def _connect(self, connection: SwarmConnection, architecture: Architecture) -> None:
        self.connection = connection
        self._active = threading.local()
        span = BlockSpan(start=0, end=connection.num_blocks)
        base = getattr(self, architecture.base_prefix.rstrip("."))
        setattr(base, architecture.blocks, RemoteBlocks(span, self._open_session))
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(getattr(module, "config", None), PretrainedConfig):
                module.config.num_hidden_layers = connection.num_blocks
                module.config._attn_implementation = MASK_NAME

    def _open_session(self, span: BlockSpan, num_rows: int, max_length: int) -> InferenceSession:
        hidden_size: int = self.config.get_text_config().hidden_size
        return self.connection.open_session(span, num_rows, max_length, hidden_size * self.dtype.itemsize)

    @contextlib.contextmanager
    def inference_session(self, max_length: int, *, num_rows: int = 1) -> Iterator[InferenceSession]:
        """One cache over several calls: `generate` and `forward` within the block go on where the last one ended.

        max_length: the most tokens (prompts and answers together) that a row may reach; servers reserve it.
        num_rows: the batch size of every call. Raises CacheFull when no server has that much room.
        """
        if getattr(self._active, "session", None) is not None:
            raise UsageError("an inference session of this model is active in this thread already")
        with self._open_session(BlockSpan(start=0, end=self.connection.num_blocks), num_rows, max_length) as session:
            self._active.session = session
            try:
                yield session
            finally:
                self._active.session = None

    def _remote_arguments(self, past_key_values: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the model's own forward: with the active session's cache, or with none at all."""
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name) or getattr(self.config, name):
                raise NotSupported(f"{name} does not work over the swarm: servers return only what leaves their span")
        session = getattr(self._active, "session", None)
        if past_key_values is None and session is not None:
            past_key_values = session.cache
        # Without a remote cache there is none: the base model must not make a local one.
        return {**arguments, "past_key_values": past_key_values, "use_cache": past_key_values is not None}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Everything the model's own `generate` accepts, except what `NotSupported` names.

        Within an inference session, pass the whole conversation so far: tokens that are cached are not sent again.
        """
        session = getattr(self._active, "session", None)
        if session is not None and kwargs.get("past_key_values") is None:
            _check_continuation(session, args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")))
            kwargs["past_key_values"] = session.cache
        self._active.temporary = None
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._active.temporary is not None:
                self._active.temporary.close()
                self._active.temporary = None

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate` once it knows how long the answer may get: here the session enters."""
        if not generation_config.use_cache or model_kwargs.get("past_key_values") is not None:
            return
        num_rows = batch_size * max(generation_config.num_return_sequences or 1, generation_config.num_beams or 1)
        span = BlockSpan(start=0, end=self.connection.num_blocks)
        self._active.temporary = self._open_session(span, num_rows, max(max_cache_length, 1))
        model_kwargs["past_key_values"] = self._active.temporary.cache

    def close(self) -> None:
        """Leave the swarm. Also happens by itself when the process ends."""
        self.connection.thread.stop()


def _check_continuation(session: InferenceSession, input_ids: Any) -> None:
    if isinstance(input_ids, torch.Tensor) and 0 < input_ids.shape[1] <= session.cache.columns:
        raise UsageError(
            f"the session holds {session.cache.columns} tokens already and the input has only {input_ids.shape[1]}: "
            "pass the whole conversation with the new tokens at its end, or set session.position back first"
        )


class AutoSwarmModelForCausalLM:
    """Makes the client's model of a checkpoint: embeddings, final norm and head here, all blocks in the swarm."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        initial_peers: tuple[str, ...] | list[str] | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        **settings: Any,
    ) -> Any:
        """The Hugging Face model of `model` (a local folder or hub id), connected to the swarm of `initial_peers`.

        initial_peers: multiaddresses of live peers; any one suffices. Other keywords are fields of `ClientConfig`.
        Raises ModelNotFound, BadAddress, JoinFailed, ModelNotServed, NotSupported, UsageError.
        """
        config = _client_config(initial_peers, settings)
        checkpoint = open_checkpoint(os.fspath(model), revision=revision, token=token)
        architecture = architecture_of(checkpoint.config)
        connection = SwarmConnection(checkpoint, config)
        try:
            local = _load_client_part(checkpoint, architecture, config)
            local._connect(connection, architecture)
        except BaseException:
            connection.thread.stop()
            raise
        return local


def _client_config(initial_peers: Any, settings: dict[str, Any]) -> ClientConfig:
    peers = (initial_peers,) if isinstance(initial_peers, str) else tuple(initial_peers or ())
    if not peers:
        raise UsageError("initial_peers is empty: give the address of at least one live peer of the swarm")
    try:
        return ClientConfig(initial_peers=peers, **settings)
    except ValidationError as error:
        raise UsageError(f"bad client setting: {explain(error)}") from error


def _load_client_part(checkpoint: Checkpoint, architecture: Architecture, config: ClientConfig) -> Any:
    """The model's own class with no blocks, its other weights loaded by transformers itself."""
    dtype = checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    names = client_tensors(architecture, checkpoint.tensor_names())
    model_class = _swarm_class(architecture.causal_class)
    with quiet_loading():
        model = model_class.from_pretrained(
            None, config=client_config(checkpoint.config), state_dict=checkpoint.read(names), dtype=dtype
        )
    model.name_or_path = checkpoint.name
    with contextlib.suppress(OSError):  # a checkpoint need not have one
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.source)
    model.eval().requires_grad_(False)
    speed_up_few_rows(model)
    return model


def _swarm_class(causal_class: type[PreTrainedModel]) -> Any:
    """The model's own class with the swarm mixed in."""

    # `generate` reads the signature of forward to see what the model accepts.
    @functools.wraps(causal_class.forward)
    def forward(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return causal_class.forward(self, *args, **self._remote_arguments(past_key_values, kwargs))

    namespace = {"__module__": __name__, "forward": forward}
    return type(f"Swarm{causal_class.__name__}", (SwarmModelMixin, causal_class), namespace)
