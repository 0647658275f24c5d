"""What an adapter's forms mean, written out on a plain transformers model: slow, dense, one adapter for all rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tiny_families import blocks_of
from torch import nn
from transformers import DynamicCache

from swarm.architectures import architecture_of, num_blocks
from swarm.data_structures import BlockSpan
from swarm.server.adapters.base import BaseBlocks
from swarm.server.adapters.forms import AdapterForms, Bottleneck, KeyValuePrefix, LinearForm, NormForm, Sparse

FINGERPRINT = "cd" * 32


def plain_base(model: Any, span: BlockSpan | None = None, fingerprint: str = FINGERPRINT) -> BaseBlocks:
    """The blocks of a plain causal model as an importer sees them; all of them unless `span` says which."""
    span = span or BlockSpan(start=0, end=num_blocks(model.config))
    architecture = architecture_of(model.config)
    blocks = blocks_of(model)
    return BaseBlocks(
        blocks=nn.ModuleList(blocks[span.start : span.end]),
        span=span,
        architecture=architecture,
        config=model.config,
        fingerprint=fingerprint,
        device=model.device,
        dtype=model.dtype,
    )


@contextlib.contextmanager
def apply_forms(model: Any, forms: AdapterForms, first_block: int = 0) -> Iterator[None]:
    """Within it, a plain causal model answers with the adapter, for every row.

    first_block: where the forms' span begins. With a prefix: `model(input_ids, attention_mask=...)` of whole texts
    only, no `generate` and no cache of the caller's.
    """
    blocks = blocks_of(model)
    with contextlib.ExitStack() as stack:
        for block, form in zip(blocks[first_block:], forms.blocks, strict=False):
            for path, linear in form.linear.items():
                stack.enter_context(_hooked(block.get_submodule(path), linear))
            for path, norm in form.norms.items():
                stack.enter_context(_with_parameters(block.get_submodule(path), norm))
            for path, bottleneck in form.bottlenecks.items():
                stack.enter_context(_hooked(block.get_submodule(path), bottleneck))
        if forms.prefix is not None:
            assert first_block == 0 and len(forms.blocks) == len(blocks), "a prefix is for all blocks at once"
            hook = _GivePrefix(forms.prefix)
            stack.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def dense(sparse: Sparse) -> torch.Tensor:
    """[out_features, in_features], float32."""
    matrix = torch.zeros(sparse.out_features * sparse.in_features)
    matrix[sparse.indices.long().cpu()] = sparse.values.cpu()
    return matrix.view(sparse.out_features, sparse.in_features)


def linear_with(form: LinearForm, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer answers to x: [..., in_features] with this form."""
    output = type(layer).forward(layer, x if form.scale_in is None else x * form.scale_in)
    if form.low_rank is not None:
        output = output + x @ form.low_rank.down.T @ form.low_rank.up.T
    if form.sparse is not None:
        output = output + x @ dense(form.sparse).to(x).T
    if form.scale_out is not None:
        output = output * form.scale_out
    return output if form.bias_out is None else output + form.bias_out


def bottleneck_of(form: Bottleneck, h: torch.Tensor) -> torch.Tensor:
    """What stands instead of a module's output h: [..., hidden_size]."""
    inner = nn.functional.linear(h, form.down, form.down_bias)
    if form.activation != "identity":
        inner = getattr(nn.functional, form.activation)(inner)
    return h + nn.functional.linear(inner, form.up, form.up_bias)


@contextlib.contextmanager
def _hooked(module: nn.Module, form: LinearForm | Bottleneck) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(form, LinearForm):
            return linear_with(form, module, args[0])
        if isinstance(output, tuple):  # an attention's: output and weights
            return bottleneck_of(form, output[0]), *output[1:]
        return bottleneck_of(form, output)

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def _with_parameters(module: nn.Module, form: NormForm) -> Iterator[None]:
    new = {"weight": form.weight, "bias": form.bias}
    old = {name: getattr(module, name).data for name, value in new.items() if value is not None}
    for name in old:
        getattr(module, name).data = new[name]
    yield
    for name, value in old.items():
        getattr(module, name).data = value


class _GivePrefix:
    """Puts the prefix into the cache of each call, as if its tokens had come before."""

    def __init__(self, prefix: KeyValuePrefix):
        self._prefix = prefix

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert kwargs.get("past_key_values") is None and kwargs.get("position_ids") is None
        rows = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        cache = DynamicCache(config=model.config)
        for block, (keys, values) in enumerate(zip(self._prefix.keys, self._prefix.values, strict=True)):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), block)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(rows), self._prefix.num_tokens), mask], dim=1)
        return args, {**kwargs, "past_key_values": cache}
