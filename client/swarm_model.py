"""What a Hugging Face model gains when its blocks move to the swarm: sessions, and what a client can train."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from swarm.architectures import Architecture
from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.protocol import RowAdapters

from . import trained_part
from .adapters import NOT_GIVEN, Adapters, NotGiven, read_choice
from .connection import SwarmConnection
from .generation import SwarmGenerationMixin
from .hidden_states import Recorder, wanted_states
from .inference_session import InferenceSession
from .local_modules import BlocksWithModules
from .peft_targets import refuse_remote_module
from .remote_blocks import MASK_NAME, RemoteBlocks
from .split_session import Session
from .swarm_base import refuse_checkpointing, swarm_base_class
from .tuning import Prompts, initial_deep_prompts, initial_soft_prompts

#: Where the base model keeps what the user saves of its prompts.
_SOFT, _DEEP = "prompts.soft", "prompts.deep"


class SwarmModelMixin(SwarmGenerationMixin):
    """Mixed into the model's own class. Its base model becomes a `SwarmBaseMixin`, its blocks `RemoteBlocks`."""

    connection: SwarmConnection
    config: PretrainedConfig
    dtype: torch.dtype
    name_or_path: str

    def _connect(
        self, connection: SwarmConnection, architecture: Architecture, remote_names: Sequence[str] = ()
    ) -> None:
        """remote_names: see `RemoteBlocks`."""
        self.connection = connection
        self._active = threading.local()
        self._base_prefix = architecture.base_prefix
        self._blocks_name = architecture.blocks
        self._base_names = frozenset(self.state_dict())  # type: ignore[attr-defined]
        base = self._base
        base.__class__ = swarm_base_class(type(base))
        self._adapters = Adapters(connection.find_adapter)
        recorder = Recorder()
        base.connect(self._active, self._adapters, recorder)
        span = BlockSpan(start=0, end=connection.num_blocks)
        blocks = RemoteBlocks(span, self._open_session, connection.passes.run_blocks, self._adapters, recorder=recorder)
        blocks.remote_names = tuple(remote_names)
        blocks.family = architecture.family
        setattr(base, self._blocks_name, blocks)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(getattr(module, "config", None), PretrainedConfig):
                module.config.num_hidden_layers = connection.num_blocks
                module.config._attn_implementation = MASK_NAME

    @property
    def _base(self) -> Any:
        return functools.reduce(getattr, self._base_prefix.rstrip(".").split("."), self)

    @property
    def _blocks(self) -> RemoteBlocks | BlocksWithModules:
        blocks: RemoteBlocks | BlocksWithModules = getattr(self._base, self._blocks_name)
        return blocks

    @property
    def _remote_blocks(self) -> RemoteBlocks:
        blocks = self._blocks
        return blocks if isinstance(blocks, RemoteBlocks) else blocks.remote

    def forward(
        self,
        *args: Any,
        active_adapter: str | NotGiven | None = NOT_GIVEN,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like the model's own.

        active_adapter: that servers apply to all rows of this call; None: the base model alone. By default that of the
        model, see `set_adapter`. adapter_names: one for each row; None or "__base__": none.
        Raises AdapterNotServed.
        """
        with self._adapters.calling(read_choice(active_adapter, adapter_names)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    # --- adapters of servers ---

    @property
    def active_adapter(self) -> str | None:
        """The adapter of rows of which a call says nothing else, applied by the servers; None: the base model alone."""
        return self._adapters.default

    def set_adapter(self, adapter_name: Any) -> None:
        """Let servers apply the adapter of this name from now on, None for none. Sessions that are open keep theirs.

        An adapter that was added to this model by `add_adapter` is here: then this is what transformers does.
        Raises AdapterNotServed if the servers do not have it.
        """
        local = getattr(self, "peft_config", {}) if self._hf_peft_config_loaded else {}  # type: ignore[attr-defined]
        if isinstance(adapter_name, list) or adapter_name in local:
            super().set_adapter(adapter_name)  # type: ignore[misc]
            return
        self._adapters.set_default(adapter_name, self._blocks.span)

    # --- sessions ---

    def _open_session(
        self,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        prompts: torch.Tensor | None = None,
        adapters: RowAdapters | None = None,
    ) -> InferenceSession:
        bytes_per_token: int = self.config.get_text_config().hidden_size * self.dtype.itemsize
        return self.connection.open_session(span, num_rows, max_length, bytes_per_token, prompts, adapters)

    @contextlib.contextmanager
    def inference_session(
        self,
        max_length: int,
        *,
        num_rows: int | None = None,
        active_adapter: str | NotGiven | None = NOT_GIVEN,
        adapter_names: Sequence[str | None] | None = None,
        output_hidden_states: bool | int | Sequence[int] = False,
    ) -> Iterator[Session]:
        """One cache over several calls: `generate` and `forward` within the block go on where the last one ended.

        max_length: the most tokens (prompts and answers together) that a row may reach; servers reserve it, and room
        for soft prompts beside it. num_rows: the batch size of every call; by default as many as adapter_names, or 1.
        active_adapter, adapter_names: see `forward`; for the whole life of the session. output_hidden_states: which of
        them calls may ask for, all or those of these numbers; each takes a session of its own on the servers.
        Raises CacheFull when no server has that much room, AdapterNotServed.
        """
        if getattr(self._active, "session", None) is not None:
            raise UsageError("an inference session of this model is active in this thread already")
        choice = read_choice(active_adapter, adapter_names)
        if num_rows is None:
            num_rows = len(choice) if isinstance(choice, tuple) else 1
        adapters = self._adapters.of_session(num_rows, self._blocks.span, choice)
        states = wanted_states(output_hidden_states, self.connection.num_blocks)
        with self._blocks.open_session(num_rows, max_length + self._prompts.num_soft, adapters, states) as session:
            self._active.session = session
            try:
                yield session
            finally:
                self._active.session = None

    # --- what a client trains ---

    @property
    def _prompts(self) -> Prompts:
        prompts: Prompts = self._base.prompts
        return prompts

    def add_soft_prompts(
        self, num_tokens: int, *, init_ids: Sequence[int] | torch.Tensor | None = None, seed: int = 0
    ) -> nn.Parameter:
        """Put `num_tokens` trainable vectors in front of every row, from now on; `generate()` uses them, too.

        init_ids: token ids of a text to start from; without it, tokens drawn with `seed`.
        Returns the parameter, float32 [num_tokens, hidden_size]. Raises UsageError.
        """
        if self._prompts.soft is not None:
            raise UsageError("this model has soft prompts already; call remove_prompts() first")
        vocabulary = self.config.get_text_config().vocab_size
        embeddings = self._base.get_input_embeddings()
        return self._prompts.set_soft(initial_soft_prompts(embeddings, vocabulary, num_tokens, init_ids, seed))

    def add_deep_prompts(self, num_tokens: int | None = None, *, std: float = 0.0, seed: int = 0) -> nn.Parameter:
        """Add trainable vectors to the hidden states of each row's first tokens, before every block, from now on.

        num_tokens: by default as many as there are soft prompts. Without soft prompts they go onto the text itself.
        std: of the normal values that they start with, drawn with `seed`; at 0 they change nothing before they are
        trained. Returns the parameter, float32 [blocks, num_tokens, hidden_size]. Raises UsageError.
        """
        if self._prompts.deep is not None:
            raise UsageError("this model has deep prompts already; call remove_prompts() first")
        if num_tokens is None:
            num_tokens = self._prompts.num_soft
            if not num_tokens:
                raise UsageError("say how many tokens deep prompts are for, or add soft prompts first")
        hidden_size = self.config.get_text_config().hidden_size
        values = initial_deep_prompts(self.connection.num_blocks, num_tokens, hidden_size, std, seed)
        return self._set_deep_prompts(values)

    def _set_deep_prompts(self, values: torch.Tensor) -> nn.Parameter:
        parameter = self._prompts.set_deep(values.to(self._base.get_input_embeddings().weight.device))
        self._remote_blocks.deep_prompts = self._prompts.deep_values
        return parameter

    def remove_prompts(self) -> None:
        """Soft and deep ones."""
        self._prompts.clear()
        self._remote_blocks.deep_prompts = None

    def insert_after(self, block: int, module: nn.Module) -> None:
        """Let `module` take the output of block number `block` (from 0): see `BlocksWithModules`. It runs here.

        Raises UsageError for a block that the model does not have, or behind which a module stands already.
        """
        if not isinstance(module, nn.Module):
            raise UsageError(f"insert_after takes a torch.nn.Module, not a {type(module).__name__}")
        if not 0 <= block < self.connection.num_blocks:
            raise UsageError(f"there is no block {block} to insert after: blocks 0 to {self.connection.num_blocks - 1}")
        blocks = self._blocks
        if isinstance(blocks, RemoteBlocks):
            setattr(self._base, self._blocks_name, BlocksWithModules(blocks, {block: module}))
        else:
            blocks.insert_after(block, module)

    def remove_after(self, block: int) -> nn.Module:
        """Undo `insert_after`, and return the module. Raises UsageError where none stands."""
        blocks = self._blocks
        if isinstance(blocks, RemoteBlocks):
            raise UsageError(f"no module stands after block {block}")
        removed = blocks.remove_after(block)
        if not blocks.inserted:
            setattr(self._base, self._blocks_name, blocks.remote)
        return removed

    def save_trained(self, folder: str | os.PathLike[str]) -> None:
        """Write what is trained (prompts, modules, heads), and only that, as safetensors. Raises UsageError."""
        trained_part.save(self, self._base_names, folder, self.name_or_path)  # type: ignore[arg-type]

    def load_trained(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save_trained` wrote. Prompts are added where there are none; modules and heads must be there.

        Raises UsageError for a file that does not fit this model; then the model is as before.
        """
        tensors = trained_part.read(folder)
        prefix = self._base_prefix
        soft, deep = tensors.get(prefix + _SOFT), tensors.get(prefix + _DEEP)
        before = self._prompts.soft, self._prompts.deep
        try:
            if before[0] is None and soft is not None:
                self._prompts.set_soft(soft)
            if before[1] is None and deep is not None:
                self._set_deep_prompts(deep)
            trained_part.load(self, self._base_names, tensors, folder)  # type: ignore[arg-type]
        except BaseException:
            self._prompts.soft, self._prompts.deep = before
            self._remote_blocks.deep_prompts = None if before[1] is None else self._prompts.deep_values
            raise

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """The same as `save_trained`, under the name that `transformers.Trainer` calls."""
        self.save_trained(save_directory)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        refuse_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable

    def get_submodule(self, target: str) -> nn.Module:
        """Raises NotSupported for a module that is on servers."""
        module: Any = self
        for name in filter(None, target.split(".")):
            if isinstance(module, RemoteBlocks) and not hasattr(module, name):
                refuse_remote_module(target)
            module = getattr(module, name, None)
        found: nn.Module = super().get_submodule(target)  # type: ignore[misc]
        return found

    def close(self) -> None:
        """Leave the swarm. Also happens by itself when the process ends."""
        self.connection.thread.stop()


def swarm_model_class(model_class: type) -> Any:
    """The model's own class with the mixin, and the signature of its own forward."""
    # Under the name of the model's own class, which transformers looks at: pipelines know the names that they support.
    qualified = {"__module__": __name__, "__qualname__": f"Swarm{model_class.__name__}"}
    mixed = type(model_class.__name__, (SwarmModelMixin, model_class), qualified)

    @functools.wraps(model_class.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SwarmModelMixin.forward(self, *args, **kwargs)

    mixed.forward = forward  # type: ignore[attr-defined]
    return mixed
