"""The models a user holds: Hugging Face models whose blocks run in the swarm."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, GenerationConfig, PretrainedConfig, PreTrainedModel

from swarm.architectures import Architecture, architecture_of, client_config, client_tensors, untested_refusal
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.devices import device_of
from swarm.errors import ModelNotFound, NotSupported, UsageError
from swarm.progress import QUIET, Progress
from swarm.protocol import explain
from swarm.quiet import quiet_loading
from swarm.tensors import DTYPES

from .config import ClientConfig
from .connection import SwarmConnection
from .few_rows import speed_up_few_rows
from .peft_targets import remote_module_names
from .self_test import check_untested
from .swarm_model import swarm_model_class

#: What the names of a language model's head start with in checkpoints, and those of a classifier's in models.
_HEADS = ("lm_head.", "embed_out.")
_NEW_HEAD = "score."


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
        progress: Progress = QUIET,
        **settings: Any,
    ) -> Any:
        """The Hugging Face model of `model` (a local folder or hub id), connected to the swarm of `initial_peers`.

        Its weights are frozen: what is trained comes on top. initial_peers: multiaddresses of live peers; any one
        suffices. token: for private and gated hub models; None takes the one that `hf auth login` or HF_TOKEN left.
        progress: told what is fetched from the hub: embeddings and head, as far as they are not here. Other keywords
        are fields of `ClientConfig`.
        Raises ModelNotFound, BadAddress, JoinFailed, ModelNotServed, AdapterNotServed, NotSupported, UsageError.
        """
        config = _client_config(initial_peers, settings)
        checkpoint = open_checkpoint(os.fspath(model), revision=revision, token=token)
        architecture = architecture_of(checkpoint.config)
        local = _connected_model(
            checkpoint, architecture, architecture.causal_class, client_config(checkpoint.config), config, progress
        )
        with contextlib.suppress(OSError):  # a checkpoint need not have one
            local.generation_config = GenerationConfig.from_pretrained(
                checkpoint.source, revision=checkpoint.revision or "main", token=token
            )
        speed_up_few_rows(local)
        return local


class AutoSwarmModelForSequenceClassification:
    """Makes a classifier of a checkpoint: embeddings, final norm and a trainable head here, all blocks in the swarm."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        problem_type: str | None = None,
        initial_peers: tuple[str, ...] | list[str] | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        progress: Progress = QUIET,
        **settings: Any,
    ) -> Any:
        """The Hugging Face classifier of `model`, connected to the swarm of `initial_peers`; only `score` is trainable.

        num_labels, id2label, problem_type: as in transformers; by default what the checkpoint says. A checkpoint
        without a head gets a new one, drawn from torch's random state. All else as in `AutoSwarmModelForCausalLM`.
        """
        config = _client_config(initial_peers, settings)
        checkpoint = open_checkpoint(os.fspath(model), revision=revision, token=token)
        architecture = architecture_of(checkpoint.config)
        names = checkpoint.tensor_names()
        if id2label is not None and num_labels is not None and len(id2label) != num_labels:
            raise UsageError(f"num_labels is {num_labels}, but id2label names {len(id2label)}")
        if id2label is not None:
            num_labels = len(id2label)
        if any(name.startswith("score.") for name in names) and num_labels not in (None, checkpoint.config.num_labels):
            raise UsageError(
                f"the checkpoint's head tells {checkpoint.config.num_labels} labels apart, not {num_labels}: leave "
                "num_labels out, or start from a checkpoint without a head"
            )

        head = client_config(checkpoint.config)
        if num_labels is not None:
            head.num_labels = num_labels
        if id2label is not None:
            head.id2label = dict(id2label)
            head.label2id = {label: number for number, label in id2label.items()}
        if problem_type is not None:
            head.problem_type = problem_type
        local = _connected_model(checkpoint, architecture, _classifier_class(checkpoint.config), head, config, progress)
        local.score.requires_grad_(True)
        return local


def _client_config(initial_peers: Any, settings: dict[str, Any]) -> ClientConfig:
    peers = (initial_peers,) if isinstance(initial_peers, str) else tuple(initial_peers or ())
    if not peers:
        raise UsageError("initial_peers is empty: give the address of at least one live peer of the swarm")
    try:
        return ClientConfig(initial_peers=peers, **settings)
    except ValidationError as error:
        raise UsageError(f"bad client setting: {explain(error)}") from error


def _classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] | None = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if found is None:
        raise NotSupported(f"transformers has no classifier for models of type {config.model_type!r}")
    return found


def _connected_model(
    checkpoint: Checkpoint,
    architecture: Architecture,
    model_class: type[PreTrainedModel],
    model_config: PretrainedConfig,
    config: ClientConfig,
    progress: Progress,
) -> Any:
    """`model_class` with no blocks, its other weights loaded by transformers itself and frozen, in the swarm.

    model_config: without blocks, too.
    """
    device = device_of(config.device)
    connection = SwarmConnection(checkpoint, config)
    try:
        names = checkpoint.tensor_names()
        own_names = client_tensors(architecture, names)
        if model_class is not architecture.causal_class:
            own_names = {name for name in own_names if not name.startswith(_HEADS)}
        dtype = checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]
        try:
            with quiet_loading():
                local, info = model_class.from_pretrained(
                    None,
                    config=model_config,
                    state_dict=checkpoint.read(own_names, progress),
                    dtype=dtype,
                    output_loading_info=True,
                )
        except (RuntimeError, ValueError) as error:
            if architecture.is_tested:
                raise
            raise untested_refusal(architecture.model_type, f"it cannot be made without blocks ({error})") from error
        if absent := sorted(name for name in info["missing_keys"] if not name.startswith(_NEW_HEAD)):
            raise ModelNotFound(f"the checkpoint has no tensors for {', '.join(absent)}")
        local.eval().requires_grad_(False)
        if not architecture.is_tested:
            check_untested(local, architecture)
        # Not before: renamings of a checkpoint's tensors are found by the name of the class.
        local.__class__ = swarm_model_class(model_class)
        local.to(device)
        local.name_or_path = checkpoint.source  # what tools such as peft load its configuration from
        local._connect(connection, architecture, remote_module_names(architecture, names))
        local.set_adapter(config.active_adapter)
    except BaseException:
        connection.thread.stop()
        raise
    return local
