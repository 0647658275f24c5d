"""The base model of a client: between embeddings and final norm, with soft prompts in front of every row."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from transformers import PretrainedConfig

from swarm.errors import NotSupported

from .adapters import NOT_GIVEN, Adapters, read_choice
from .cache import RemoteCache
from .hidden_states import Recorder, wanted_states
from .remote_blocks import check_positions, new_columns, refuse_local_cache
from .tuning import Prompts


class SwarmBaseMixin:
    """What a base model gains when its blocks move to the swarm. Mixed into the model's own class.

    Whoever calls it, a head or the user, gets hidden states of just the tokens that were passed: it puts soft prompts
    in front and cuts their positions off again, so labels, masks and heads need not know of them.
    """

    config: PretrainedConfig
    prompts: Prompts
    active: threading.local  # `active.session`: of the model's `inference_session` in this thread

    adapters: Adapters
    recorder: Recorder  # of hidden states that pass, shared with the blocks

    def connect(self, active: threading.local, adapters: Adapters, recorder: Recorder) -> None:
        self.active = active
        self.adapters = adapters
        self.recorder = recorder
        self.prompts = Prompts()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Like the model's own, with the active session's cache, or with none at all.

        active_adapter, adapter_names: see `SwarmModelMixin.forward`.
        """
        choice = read_choice(arguments.pop("active_adapter", NOT_GIVEN), arguments.pop("adapter_names", None))
        with self.adapters.calling(choice):
            return self._forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **arguments)

    def _forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        inputs_embeds: torch.Tensor | None,
        **arguments: Any,
    ) -> Any:
        refuse_attentions(self.config, arguments)
        asked = arguments.pop("output_hidden_states", None)
        states = wanted_states(
            self.config.output_hidden_states if asked is None else asked, self.config.num_hidden_layers
        )
        if past_key_values is None and (session := getattr(self.active, "session", None)) is not None:
            past_key_values = session.cache
        # Without a remote cache there is none: the base model must not make a local one.
        arguments |= {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            refuse_local_cache(past_key_values)
        cache: RemoteCache | None = past_key_values
        is_start = cache is None or not cache.columns
        if cache is not None and is_start:
            cache.begin(self.prompts.num_soft)
        num_prompts = self.prompts.num_soft if cache is None else cache.prompt_tokens
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):  # the model itself refuses
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)  # type: ignore[misc]
        num_rows, num_tokens = tokens.shape[:2]
        if attention_mask is None:
            real = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=tokens.device)
        else:
            columns = num_tokens + (0 if cache is None else cache.columns)
            real = new_columns(attention_mask, num_rows, columns, num_tokens)
        check_positions(position_ids, real)
        if num_prompts and attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(num_rows, num_prompts), attention_mask], dim=1)
        if num_prompts and is_start:
            assert self.prompts.soft is not None
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            soft = self.prompts.soft.to(inputs_embeds).expand(num_rows, -1, -1)
            input_ids, inputs_embeds = None, torch.cat([soft, inputs_embeds], dim=1)
            position_ids, num_tokens = None, num_tokens + num_prompts
        elif num_prompts and position_ids is not None:
            position_ids = position_ids + num_prompts  # matter here where the client adds embeddings of positions
        elif num_prompts and attention_mask is None:
            assert cache is not None
            position_ids = torch.arange(cache.filled, cache.filled + num_tokens, device=tokens.device)[None]
        if position_ids is None and attention_mask is not None and (inputs_embeds is not None or num_prompts):
            # As servers count: padding may lie between prompts (ours or peft's) and the text. Other gaps are refused.
            position_ids = attention_mask.bool().cumsum(1).sub(1).clamp(min=0)[:, -num_tokens:]
        arguments |= {"attention_mask": attention_mask, "position_ids": position_ids}
        hidden_prompts = num_prompts if is_start else 0
        if not states:
            output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)  # type: ignore[misc]
            return _without_prompts(output, hidden_prompts) if hidden_prompts else output
        return_dict = arguments.pop("return_dict", None)
        # It would put in what it sees of the blocks itself, which is nothing.
        arguments |= {"output_hidden_states": False, "return_dict": True}
        with self.recorder.recording(states) as kept:
            output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)  # type: ignore[misc]
        if hidden_prompts:
            output = _without_prompts(output, hidden_prompts)
        last = self.config.num_hidden_layers
        inner = [kept[index][:, hidden_prompts:] if index in kept else None for index in range(last)]
        output["hidden_states"] = (*inner, output.last_hidden_state if last in states else None)
        return (
            output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        refuse_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable


def swarm_base_class(base_class: type) -> Any:
    """The base model's own class with the mixin, and the signature of its own forward."""
    mixed = type(f"Swarm{base_class.__name__}", (SwarmBaseMixin, base_class), {"__module__": __name__})

    @functools.wraps(base_class.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SwarmBaseMixin.forward(self, *args, **kwargs)

    mixed.forward = forward  # type: ignore[attr-defined]
    return mixed


def refuse_attentions(config: PretrainedConfig, arguments: dict[str, Any]) -> None:
    if arguments.get("output_attentions") or config.output_attentions:
        raise NotSupported(
            "output_attentions does not work over the swarm: servers never hold the weights of attention as a whole; "
            "leave it off"
        )


def refuse_checkpointing() -> None:
    raise NotSupported(
        "gradient checkpointing has nothing to save here: servers keep no activations and compute them anew in the "
        "backward pass already, and the client holds no blocks; leave it off"
    )


def _without_prompts(output: Any, num_prompts: int) -> Any:
    """A base model's output, as a dataclass or as a tuple whose first entry is the last hidden state."""
    if isinstance(output, tuple):
        return output[0][:, num_prompts:], *output[1:]
    output.last_hidden_state = output.last_hidden_state[:, num_prompts:]
    return output
