"""Which configurations of peft work on the swarm's model (docs/training.md lists them), and what others are told."""

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from swarm.client.model import AutoSwarmModelForSequenceClassification
from swarm.errors import NotSupported

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

#: {row of the table in docs/training.md: a configuration}
WORK = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning (MLP)": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "P-tuning (LSTM)": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.0,
    ),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2
    ),
    "context-aware prompt tuning": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    ),
    "LoRA in the head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
    "LoRA in the embeddings": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]),
    "LoHa in the head": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2]),
}

REFUSED = {
    "LoRA with its default modules": lambda: peft.LoraConfig(task_type="CAUSAL_LM"),
    "LoRA in some remote modules": lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"]),
    "LoRA by pattern": lambda: peft.LoraConfig(target_modules=r".*\.layers\.3\..*q_proj"),
    "modules_to_save": lambda: peft.LoraConfig(target_modules=["lm_head"], modules_to_save=["down_proj"]),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "layer norm tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def with_peft(model, config):
    torch.manual_seed(7)
    adapted = get_peft_model(model, config)
    with torch.no_grad():  # LoRA begins with zeros, which hide what does not arrive
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn(value.shape))
    return adapted


@pytest.mark.parametrize("name", WORK)
def test_these_train_and_generate_as_on_the_plain_model(model, tiny_llama_folder, name):
    ours = with_peft(model, WORK[name]())
    theirs = with_peft(LlamaForCausalLM.from_pretrained(tiny_llama_folder), WORK[name]())
    ids = tokens(2, 7)
    more = {"task_ids": torch.tensor([0, 1])} if "multitask" in name else {}
    assert [key for key, value in ours.named_parameters() if value.requires_grad] == [
        key for key, value in theirs.named_parameters() if value.requires_grad
    ]
    for _ in range(2):
        losses = []
        for adapted in (ours, theirs):
            optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=0.1)
            losses.append(adapted(input_ids=ids, labels=ids, **more).loss)
            losses[-1].backward()
            assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **more}
    ours.eval(), theirs.eval()
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_padding_does_not_change_a_row(model):
    """On the plain model it does: peft leaves a gap in the positions between its prompt and a text behind padding."""
    ours = with_peft(model, WORK["prompt tuning"]()).eval()
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    together = ours.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    alone = ours.generate(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:], max_new_tokens=8)
    assert torch.equal(together[0, 2:], alone[0])


def test_prompt_tuning_saves_and_loads(model, plain, tmp_path, tiny_llama_folder):
    ours = with_peft(model, WORK["prompt tuning"]())
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_folder), tmp_path).eval()
    ids = tokens(1, 6)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    assert torch.equal(ours.generate(**options), loaded.generate(**options))


def test_prompt_tuning_of_a_classifier(model, tiny_llama_folder):
    def config():
        return peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)

    swarm_model = AutoSwarmModelForSequenceClassification.from_pretrained(
        tiny_llama_folder, initial_peers=[PEER], num_labels=3
    )
    local = LlamaForSequenceClassification.from_pretrained(tiny_llama_folder, num_labels=3)
    local.score.load_state_dict(swarm_model.score.state_dict())
    ours, theirs = with_peft(swarm_model, config()), with_peft(local, config())
    ids, labels = tokens(2, 6), torch.tensor([2, 0])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # on the left: peft passes embeddings
    result = ours(input_ids=ids, attention_mask=mask, labels=labels)
    alone = [theirs(input_ids=row[real][None]).logits for row, real in zip(ids, mask.bool(), strict=True)]
    torch.testing.assert_close(result.logits, torch.cat(alone), rtol=0, atol=1e-5)
    result.loss.backward()
    trained = {name for name, value in ours.named_parameters() if value.grad is not None}
    assert trained == {"prompt_encoder.default.embedding.weight", "base_model.score.modules_to_save.default.weight"}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_in_remote_blocks_are_refused(model, name):
    with pytest.raises(NotSupported, match=r"layers\.\d.* is on servers of the swarm.*run-server --adapters"):
        get_peft_model(model, REFUSED[name]())


def test_adapters_that_transformers_adds_are_refused(model):
    with pytest.raises(NotSupported, match="is on servers of the swarm"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))


def test_all_linear_finds_nothing_here(model):
    with pytest.raises(ValueError, match="No `target_modules`"):
        get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))


def test_prefix_tuning_is_refused(model):
    adapted = get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids = tokens(1, 5)
    with pytest.raises(NotSupported, match=r"prefix tuning does not work .* deep prompts"):
        adapted(input_ids=ids)
    with pytest.raises(NotSupported, match="prefix tuning does not work"):
        adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


def test_a_remote_module_by_name(model):
    with pytest.raises(NotSupported, match=r"model\.layers\.2\.mlp\.up_proj is on servers"):
        model.get_submodule("model.layers.2.mlp.up_proj")
    model.insert_after(3, torch.nn.Linear(64, 64))
    assert model.get_submodule("model.layers.inserted.3") is model.model.layers.inserted["3"]
    with pytest.raises(NotSupported, match="is on servers"):
        get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AttributeError):
        model.get_submodule("model.nothing")


def test_lora_in_an_inserted_module(model):
    model.insert_after(3, torch.nn.Linear(64, 64))
    adapted = get_peft_model(model, peft.LoraConfig(target_modules=["inserted.3"]))
    ids = tokens(1, 5)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert len(trained) == 2 and all("inserted.3.lora_" in name for name in trained)
