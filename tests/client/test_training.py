"""Whole training programs: transformers' Trainer, plain loops, custom heads, classifiers."""

import json

import peft
import pytest
import torch
from local_blocks import LocalConnection
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from swarm.client.model import AutoSwarmModelForCausalLM, AutoSwarmModelForSequenceClassification
from swarm.errors import NotSupported, UsageError

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def connect(plain, monkeypatch):
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: LocalConnection(plain))


@pytest.fixture
def load(connect, tiny_llama_folder):
    return lambda: AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER])


@pytest.fixture
def load_classifier(connect, tiny_llama_folder):
    def load(folder=tiny_llama_folder, **settings):
        return AutoSwarmModelForSequenceClassification.from_pretrained(folder, initial_peers=[PEER], **settings)

    return load


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


TEXTS = [{"input_ids": row, "labels": row} for row in tokens(8, 6)]


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(model, folder, resume=None, **settings):
    """The losses of 12 steps of 2 rows each, three times through the texts."""
    losses = Losses()
    defaults = {"per_device_train_batch_size": 2, "max_steps": 12, "logging_steps": 1, "save_steps": 6}
    arguments = TrainingArguments(
        folder,
        **{**defaults, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "disable_tqdm": True, **settings},
    )
    trainer = Trainer(model, arguments, train_dataset=TEXTS, callbacks=[losses])
    trainer.train(resume_from_checkpoint=resume)
    return losses.values


# --- transformers.Trainer --------------------------------------------------------------------------------------------


def test_the_trainer_trains_saves_and_resumes(load, tmp_path):
    model = load()
    model.add_soft_prompts(4)
    model.add_deep_prompts()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    losses = train(model, tmp_path)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert set(saved) == {"model.prompts.soft", "model.prompts.deep"}
    assert torch.equal(saved["model.prompts.deep"], model.model.prompts.deep)
    assert not (tmp_path / "checkpoint-12" / "config.json").exists(), (
        "this is no whole model, and must not look like one"
    )

    resumed = load()
    resumed.add_soft_prompts(4, seed=9)
    resumed.add_deep_prompts()
    assert train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-6")) == losses[6:]
    for name, value in saved.items():
        torch.testing.assert_close(resumed.get_parameter(name).data, value)


def test_the_trainer_trains_what_peft_adds_as_on_the_plain_model(load, tmp_path, tiny_llama_folder):
    losses = []
    for name, base in (("ours", load()), ("plain", LlamaForCausalLM.from_pretrained(tiny_llama_folder))):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        losses.append(train(model, tmp_path / name))
        assert (tmp_path / name / "checkpoint-12" / "adapter_model.safetensors").exists()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 12


def test_gradient_accumulation_of_the_trainer_equals_a_larger_batch(load, tmp_path):
    results = []
    for settings in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4, "batch": 1}):
        settings["per_device_train_batch_size"] = settings.pop("batch", 4)
        model = load()
        model.add_soft_prompts(4)
        losses = train(model, tmp_path / str(len(results)), max_steps=2, save_strategy="no", **settings)
        results.append((losses, model.model.prompts.soft.detach()))
    (large_losses, large), (small_losses, small) = results
    assert large_losses == pytest.approx(small_losses, rel=1e-5)
    torch.testing.assert_close(large, small, rtol=0, atol=1e-5 * large.abs().max().item())


def test_gradient_checkpointing_of_the_trainer_is_refused(load, tmp_path):
    model = load()
    model.add_soft_prompts(4)
    with pytest.raises(NotSupported, match="leave it off"):
        train(model, tmp_path, gradient_checkpointing=True)


# --- heads of the user -----------------------------------------------------------------------------------------------


def test_a_head_of_the_user_on_hidden_states(load, plain):
    """The base model gives hidden states of the text, with gradients; what is put on them is up to the user."""
    model = load()
    soft = model.add_soft_prompts(3)
    torch.manual_seed(0)
    head = nn.Linear(64, 5)
    ids = tokens(2, 6)
    loss = head(model.model(ids).last_hidden_state.mean(dim=1)).square().sum()
    loss.backward()
    values = soft.detach().clone().requires_grad_()
    embeddings = torch.cat([values.expand(2, -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    expected = head(plain.model(inputs_embeds=embeddings).last_hidden_state[:, 3:].mean(dim=1)).square().sum()
    ours = head.weight.grad.clone()
    head.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, other in ((ours, head.weight.grad), (soft.grad, values.grad)):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5 * other.abs().max().item())


# --- classifiers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier_folder(plain, tmp_path_factory, tiny_llama_folder):
    """The tiny Llama with a head of 3 labels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-classifier"
    config = AutoConfig.from_pretrained(tiny_llama_folder, num_labels=3)
    LlamaForSequenceClassification.from_pretrained(tiny_llama_folder, config=config).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_of_a_checkpoint_with_a_head(load_classifier, classifier_folder, side):
    model = load_classifier(classifier_folder)
    theirs = LlamaForSequenceClassification.from_pretrained(classifier_folder).eval()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    padding = slice(0, 4) if side == "left" else slice(5, 9)
    ids[0, padding], mask[0, padding] = 0, 0
    options = {"attention_mask": mask, "labels": torch.tensor([2, 0])}
    ours, expected = model(ids, **options), theirs(ids, **options)
    assert ours.logits.shape == (2, 3)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-5 * expected.logits.abs().max().item())
    torch.testing.assert_close(ours.loss, expected.loss)


def test_a_new_head_learns_with_prompts(load_classifier, tmp_path):
    torch.manual_seed(0)
    model = load_classifier(id2label={0: "low", 1: "high"})
    assert model.config.num_labels == 2 and model.config.label2id == {"low": 0, "high": 1}
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["score.weight"]
    model.add_soft_prompts(4)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.02)
    ids = tokens(8, 5)
    labels = (ids[:, -1] > 127).long()
    for _ in range(20):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(ids).logits.argmax(dim=1), labels)
    model.save_trained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"model.prompts.soft", "score.weight"}
    other = load_classifier(num_labels=2)
    other.load_trained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_labels_that_contradict_are_refused(load_classifier, classifier_folder, tmp_path, tiny_llama_folder):
    with pytest.raises(UsageError, match="tells 3 labels apart, not 2"):
        load_classifier(classifier_folder, num_labels=2)
    with pytest.raises(UsageError, match="num_labels is 3, but id2label names 2"):
        load_classifier(num_labels=3, id2label={0: "low", 1: "high"})
    for source in tiny_llama_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "cohere"}))
    with pytest.raises(NotSupported, match="no classifier for models of type 'cohere'"):
        load_classifier(tmp_path)
