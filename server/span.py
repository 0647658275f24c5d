"""The blocks of one span, run through the model's own forward pass.

The model is the Hugging Face class with its block list cut to the span, no embeddings and no final norm. It is called
with `inputs_embeds` of shape [1, tokens, hidden_size]: the flattened batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from transformers import PretrainedConfig

from swarm.architectures import Architecture, span_config
from swarm.data_structures import BlockSpan

from .adapters.applied import AppliedAdapters
from .adapters.base import BaseBlocks
from .attention import running
from .batch import FlatBatch, RowChunk, WholeRows
from .decode_batch import DecodeBatch
from .kv_cache import KVCache


class Span:
    """Blocks [blocks.start, blocks.end) of a model on one device."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        blocks: BlockSpan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        padded_size: Callable[[int], int] = lambda num_tokens: num_tokens,
    ):
        """padded_size: how many tokens a batch of so many should be padded to, to suit the linear layers."""
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self._padded_size = padded_size
        self.hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        self._model = model
        self._architecture = architecture
        self._slices: dict[tuple[int, int], nn.Module] = {(0, len(blocks)): model}
        self.adapters = AppliedAdapters(list(self.modules), device)

    @property
    def modules(self) -> nn.ModuleList:
        """The blocks themselves."""
        modules: nn.ModuleList = getattr(self._model, self._architecture.blocks)
        return modules

    def local(self, span: BlockSpan) -> tuple[int, int]:
        """A sub-span of the model's blocks as indices into this span's blocks."""
        return span.start - self.blocks.start, span.end - self.blocks.start

    def base_blocks(self, config: PretrainedConfig, fingerprint: str, *, most_bytes: int | None = None) -> BaseBlocks:
        """These blocks, for those who turn files of adapters into what runs here.

        config: the whole model's. most_bytes: that one adapter may take; None: any number.
        """
        return BaseBlocks(
            self.modules, self.blocks, self._architecture, config, fingerprint, self.device, self.dtype, most_bytes
        )

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        """Run every chunk through its own blocks; [tokens, hidden_size] -> the same shape, both in the span's dtype.

        The batch is cut at every block boundary in use, so rows that enter or leave in between share all blocks that
        they have in common. Where rows have deep prompts it is cut at every block.
        """
        prompts = [chunk.prompts for chunk in chunks]
        boundaries = {chunk.start for chunk in chunks} | {chunk.end for chunk in chunks}
        if len(boundaries) == 2 and not any(own is not None for own in prompts):
            return self._run_segment(hidden, chunks, cache, *sorted(boundaries))
        for chunk, own in zip(chunks, prompts, strict=True):
            if own is not None:  # every block adds some
                boundaries.update(range(chunk.start, chunk.end))
        firsts = [0]
        for chunk in chunks:
            firsts.append(firsts[-1] + chunk.num_tokens)
        hidden = hidden.clone()
        for start, end in pairwise(sorted(boundaries)):
            active = [index for index, chunk in enumerate(chunks) if chunk.start <= start and end <= chunk.end]
            if not active:
                continue
            for index in active:
                if (own := prompts[index]) is not None:
                    hidden[firsts[index] : firsts[index] + own.shape[1]] += own[start - chunks[index].start]
            tokens = torch.cat([torch.arange(firsts[index], firsts[index + 1]) for index in active]).to(hidden.device)
            hidden[tokens] = self._run_segment(hidden[tokens], [chunks[i] for i in active], cache, start, end)
        return hidden

    def _run_segment(
        self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache, start: int, end: int
    ) -> torch.Tensor:
        if self.device.type == "cuda" and DecodeBatch.suits(chunks):
            return self.decode(hidden, DecodeBatch.of(chunks, cache, self.device), start, end)
        batch = FlatBatch(chunks, cache, self.device, self._padded_size(len(hidden)))
        if batch.padding:  # with copies, which choose the same experts as the last token where a model has some
            hidden = torch.cat([hidden, hidden[-1:].expand(batch.padding, -1)])
        return self._run(hidden, batch, start, end)[: batch.num_tokens]

    @torch.inference_mode()
    def decode(self, hidden: torch.Tensor, batch: DecodeBatch, start: int, end: int) -> torch.Tensor:
        """One new token for each row of a located batch; [rows, hidden_size] -> the same shape."""
        return self._run(hidden, batch, start, end)

    def run_whole(self, hidden: torch.Tensor, batch: WholeRows, block: int) -> torch.Tensor:
        """Whole sequences through one local block, without a cache; [tokens, hidden_size] -> the same shape.

        Gradients reach `hidden` where they are enabled.
        """
        return self._run(hidden, batch, block, block + 1)

    def _run(
        self, hidden: torch.Tensor, batch: FlatBatch | DecodeBatch | WholeRows, start: int, end: int
    ) -> torch.Tensor:
        with self.adapters.applied(batch.adapter_runs), running(batch):
            output = self._slice(start, end)(
                inputs_embeds=hidden[None], position_ids=batch.position_ids, use_cache=False
            )
        hidden_states: torch.Tensor = output.last_hidden_state[0]
        return hidden_states

    def _slice(self, start: int, end: int) -> nn.Module:
        """The model with only blocks [start, end) of the span; shares all weights."""
        if (start, end) not in self._slices:
            model = copy.copy(self._model)
            model._modules = dict(self._model._modules)
            setattr(model, self._architecture.blocks, nn.ModuleList(list(self.modules)[start:end]))
            model.config = span_config(self._model.config, BlockSpan(start=start, end=end))
            self._slices[start, end] = model
        return self._slices[start, end]
