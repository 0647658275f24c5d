"""What peft finds on a client, and what it is told of the blocks that are elsewhere.

peft puts adapters into modules that it looks for by name. Those of the blocks are on servers, so here they are names
without weights: a configuration that wants one of them is refused, instead of adapting only what happens to be here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from swarm.architectures import Architecture, within_base
from swarm.errors import NotSupported

#: Of peft: what trains keys and values in front of the text.
_KEY_VALUE_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


class RemoteModule(nn.Module):
    """Stands for every module that runs on servers."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupported("this module runs on servers of the swarm; call a run of blocks: model.model.layers[3:7]")


REMOTE_MODULE = RemoteModule()


def remote_module_names(architecture: Architecture, tensor_names: Iterable[str]) -> list[str]:
    """The modules in the blocks that have weights, as the block list knows them: "0.self_attn.q_proj", ..."""
    prefix = f"{architecture.blocks}."
    within = (within_base(architecture, name) for name in tensor_names)
    modules = {name.removeprefix(prefix).rpartition(".")[0] for name in within if name.startswith(prefix)}
    return sorted(name for name in modules if "." in name)


def refuse_remote_module(name: str) -> NoReturn:
    raise NotSupported(
        f"{name} is on servers of the swarm, so no adapter (LoRA, IA3, ...) can be put into it from here. One that was "
        "trained elsewhere can be served (run-server --adapters) and used (model.set_adapter). What trains here: soft "
        "and deep prompts, modules between blocks (insert_after), heads, and adapters in lm_head or embed_tokens "
        "(target_modules=['lm_head'])"
    )


def refuse_key_value_prefixes() -> NoReturn:
    raise NotSupported(
        "keys and values of this machine do not reach the servers: prefix tuning does not work over the swarm; deep "
        "prompts train something at every block, too: model.add_deep_prompts(...). To keep a cache over several calls, "
        "use model.inference_session(...)"
    )


def peft_prompt_tokens(model: Any) -> int:
    """Virtual tokens that peft's prompt tuning puts before each row while its `generate` runs `model`, else 0.

    peft lends the model a `prepare_inputs_for_generation` of its own for that time. Raises NotSupported for prefixes.
    """
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    config = getattr(owner, "active_peft_config", None) if owner is not model else None
    if config is not None and config.peft_type in _KEY_VALUE_PREFIXES:
        refuse_key_value_prefixes()
    return int(getattr(config, "num_virtual_tokens", None) or 0)
