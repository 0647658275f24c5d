"""Real adapters, made with the libraries that write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_adapters import apply_forms, plain_base

from swarm.data_structures import BlockSpan
from swarm.server.adapters.forms import tensors_of
from swarm.server.adapters.importing import import_adapter, read_manifest

IDS = torch.arange(24).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return answer


def peft_logits(model: Any, folder: Path) -> torch.Tensor:
    """What peft makes of an adapter's files."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())


@pytest.fixture
def load_peft() -> Callable[[Any, Path], torch.Tensor]:
    return peft_logits


@pytest.fixture
def save_peft(tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Adds an adapter to a copy of a model, fills it with random numbers, saves it.

    Returns its folder, and the logits that peft gives for `IDS` once it has loaded the folder.
    """
    peft = pytest.importorskip("peft")

    def save(model: Any, config: Any, parts: tuple[str, ...] = (), spread: float = 0.1) -> tuple[Path, torch.Tensor]:
        """parts: words in the names of other parameters that were trained too, such as "bias"."""
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or any(part in name for part in parts):
                parameter.data += torch.randn_like(parameter) * spread
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", peft_logits(model, tmp_path / "adapter")

    return save


@pytest.fixture
def check() -> Callable[..., Any]:
    """Imports an adapter and compares what its forms mean with the logits of the library that wrote it."""

    def check(folder: Path, model: Any, expected: torch.Tensor) -> Any:
        plain = logits(model)
        assert (plain - expected).abs().max() > 1e-2 * plain.abs().max(), "the adapter changes nothing"
        forms = import_adapter(folder, plain_base(model))
        with apply_forms(model, forms):
            answer = logits(model)
        assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(logits(model), plain)
        # A span in the middle has just its part of it.
        part = import_adapter(folder, plain_base(model, BlockSpan(start=3, end=5)))
        for own, same in zip(part.blocks, forms.blocks[3:5], strict=True):
            assert (own.linear.keys(), own.norms.keys()) == (same.linear.keys(), same.norms.keys())
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(own), tensors_of(same), strict=True))
        assert read_manifest(folder).file_bytes > 0
        return forms

    return check
