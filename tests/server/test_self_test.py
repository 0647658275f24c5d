"""Models of families that are not tested are tried before they are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import ALWAYS, saved_model, spans_of, tiny_config

from swarm.architectures import FAMILIES
from swarm.checkpoint import Checkpoint
from swarm.client.model import AutoSwarmModelForCausalLM, AutoSwarmModelForSequenceClassification
from swarm.data_structures import BlockSpan
from swarm.errors import NotSupported
from swarm.server import self_test
from swarm.server.loader import load_span

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
#: Of the tested ones, those that need a row of data or a function: unknown, they must be refused.
NEED_MORE = ["bloom", "falcon", "gpt2", "llama4_text", "opt"]


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family is known."""
    for name in list(FAMILIES):
        monkeypatch.delitem(FAMILIES, name)


def load(checkpoint: Checkpoint, start: int = 1, end: int = 6) -> Any:
    span = BlockSpan(start=start, end=end)
    return load_span(checkpoint, span, dtype=torch.float32, quantization="none", device=torch.device("cpu"))


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("model_type", [name for name in ALWAYS if name not in NEED_MORE])
def test_what_works_the_general_way_is_accepted(model_type: str, tmp_path: Path) -> None:
    _, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    spans_of(checkpoint)


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("model_type", [*NEED_MORE, "diffllama", "doge", "afmoe"])
def test_what_does_not_is_refused(model_type: str, tmp_path: Path) -> None:
    _, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    with pytest.raises(NotSupported, match=rf"^models of type '{model_type}' are not among the tested ones, and"):
        load(checkpoint)


def test_a_cache_that_is_larger_than_predicted_is_found_out(tmp_path: Path) -> None:
    _, checkpoint = saved_model(tiny_config("jetmoe"), tmp_path)
    with pytest.raises(NotSupported, match="block 1 stores more of each token than servers reserve memory for"):
        load(checkpoint)


@pytest.mark.usefixtures("untested")
def test_a_window_that_is_not_seen_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is in the model."""
    from swarm.server.attention import paged_attention

    def without_windows(*arguments: Any, sliding_window: int | None = None, **options: Any) -> Any:
        return paged_attention(*arguments, **options)

    _, checkpoint = saved_model(tiny_config("mistral", sliding_window=4096), tmp_path)
    load(checkpoint)
    monkeypatch.setattr("swarm.server.attention.paged_attention", without_windows)
    with pytest.raises(NotSupported, match=r"block 1 gives other values beside its cache than in the model itself"):
        load(checkpoint)


@pytest.mark.usefixtures("untested")
def test_each_kind_of_block_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    error_of = self_test._error_and_size

    def noting(checkpoint: Any, architecture: Any, number: int, *rest: Any) -> tuple[float, int]:
        tried.append(number)
        return error_of(checkpoint, architecture, number, *rest)

    monkeypatch.setattr(self_test, "_error_and_size", noting)
    _, checkpoint = saved_model(tiny_config("deepseek_v3"), tmp_path)
    load(checkpoint)
    assert tried == [1, 3]  # dense, and experts


@pytest.mark.usefixtures("untested")
def test_weights_of_one_block_at_a_time_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    error_of = self_test._error_and_size

    def noting(*arguments: Any) -> tuple[float, int]:
        whole = arguments[4]
        held.append(sum(parameter.device.type != "meta" for parameter in whole.parameters()))
        return error_of(*arguments)

    monkeypatch.setattr(self_test, "_error_and_size", noting)
    _, checkpoint = saved_model(tiny_config("deepseek_v3"), tmp_path)
    load(checkpoint)
    assert held == [0, 0]


def test_tested_families_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_difference", lambda *_: pytest.fail("it was tried"))
    _, checkpoint = saved_model(tiny_config("llama"), tmp_path)
    load(checkpoint)


# --- the client's part ---


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients that are connected to nobody."""
    connection = SimpleNamespace(
        num_blocks=7,
        passes=SimpleNamespace(run_blocks=None),
        thread=SimpleNamespace(stop=lambda: None),
        find_adapter=None,
    )
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda *_: connection)
    yield


@pytest.mark.usefixtures("untested", "alone")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "granite", "mixtral", "cohere"])
def test_a_client_whose_parts_are_where_they_were_sought(model_type: str, tmp_path: Path) -> None:
    model, _ = saved_model(tiny_config(model_type), tmp_path)
    client = AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])
    assert len(client.model.layers) == model.config.num_hidden_layers == client.config.num_hidden_layers


@pytest.mark.usefixtures("untested", "alone")
@pytest.mark.parametrize("model_type", NEED_MORE[:3])
def test_a_client_whose_parts_are_elsewhere_is_refused(model_type: str, tmp_path: Path) -> None:
    saved_model(tiny_config(model_type), tmp_path)
    with pytest.raises(NotSupported, match=rf"^models of type '{model_type}' are not among the tested ones, and"):
        AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])


@pytest.mark.usefixtures("untested", "alone")
def test_a_client_that_hands_its_blocks_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    saved_model(tiny_config("llama"), tmp_path)
    forward = LlamaModel.forward

    def with_more(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        return forward(self, input_ids, per_layer_inputs=self.embed_tokens(input_ids), **options)

    monkeypatch.setattr(LlamaModel, "forward", with_more)
    with pytest.raises(NotSupported, match="hands its blocks something that servers do not get: per_layer_inputs"):
        AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])


@pytest.mark.usefixtures("untested", "alone")
def test_a_client_whose_blocks_are_not_told_what_is_masked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.llama.modeling_llama import LlamaModel

    saved_model(tiny_config("llama"), tmp_path)

    def without_masks(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(LlamaModel, "forward", without_masks)
    with pytest.raises(NotSupported, match="does not tell its blocks which tokens are masked"):
        AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])


@pytest.mark.usefixtures("untested", "alone")
def test_classifiers_are_tried_as_well(tmp_path: Path) -> None:
    saved_model(tiny_config("llama"), tmp_path / "llama")
    AutoSwarmModelForSequenceClassification.from_pretrained(tmp_path / "llama", initial_peers=[PEER], num_labels=3)
    saved_model(tiny_config("diffllama"), tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swarm.client.self_test._difference", lambda *_: "it is another thing")
        with pytest.raises(NotSupported, match="a trial of this one failed: it is another thing"):
            AutoSwarmModelForSequenceClassification.from_pretrained(
                tmp_path / "other", initial_peers=[PEER], num_labels=3
            )


def test_weights_that_the_clients_part_lacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    from swarm.errors import ModelNotFound

    saved_model(tiny_config("llama"), tmp_path)
    tensors = Checkpoint.tensor_names
    monkeypatch.setattr(Checkpoint, "tensor_names", lambda self: tensors(self) - {"model.norm.weight"})
    with pytest.raises(ModelNotFound, match=r"the checkpoint has no tensors for model\.norm\.weight"):
        AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])
