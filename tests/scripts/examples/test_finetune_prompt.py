"""The prompt-tuning example, on a tiny model: what it trains, what it compares, and how it fails."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.errors import UsageError
from swarm.scripts.examples import finetune_prompt as program
from swarm.scripts.examples import loss_plot
from swarm.scripts.examples.finetune_prompt import largest_difference
from swarm.scripts.examples.loss_plot import check_plottable, plot_losses
from swarm.scripts.examples.prompt_training import (
    INSTRUCTION,
    QUESTION,
    Encoder,
    Learner,
    PromptedModel,
    shuffled,
)
from swarm.scripts.examples.topic_texts import LABELS, train_and_test


@pytest.fixture(scope="module")
def folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of the words in the texts; those of the labels are 1 to 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    texts = [INSTRUCTION, *(example.text + QUESTION for example in train_and_test(1000, 1, seed=0)[0])]
    found = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)} - set(LABELS)
    words = ["<unknown>", *LABELS, *sorted(found)]
    assert len(words) <= 256
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = splitter
    folder = tmp_path_factory.mktemp("models") / "tiny-topics"
    shutil.copytree(tiny_llama_folder, folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(folder))


def test_only_the_last_token_has_a_label(encoder: Encoder) -> None:
    texts = train_and_test(8, 1, seed=0)[0]
    batch = encoder.batch(texts)
    assert encoder.label_tokens == [1, 2, 3, 4]
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
    for row, text in enumerate(texts):
        length = int(batch.attention_mask[row].sum())
        label = LABELS.index(text.label) + 1
        assert batch.input_ids[row, length - 1] == label
        assert batch.labels[row].tolist() == [
            label if column == length - 1 else -100 for column in range(batch.labels.shape[1])
        ]


def test_loss_and_logits_are_those_of_each_text_alone(model: Any, encoder: Encoder) -> None:
    """Neither the padding nor the label in the text has a say."""
    texts = train_and_test(6, 1, seed=0)[0]
    prompted = PromptedModel(model, model.get_input_embeddings().weight[10:13])
    together = encoder.batch(texts)
    output = prompted(**vars(together))
    losses = []
    for row, text in enumerate(texts):
        batch = encoder.batch([text])
        embeddings = model.get_input_embeddings()(batch.input_ids[:, :-1])
        alone = model(inputs_embeds=torch.cat([prompted.prompt[None], embeddings], dim=1)).logits[0, -1]
        torch.testing.assert_close(output.logits[row, embeddings.shape[1] - 1], alone, rtol=1e-5, atol=1e-5)
        losses.append(-alone.log_softmax(0)[batch.input_ids[0, -1]])
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_a_learner_learns_and_repeats_itself(model: Any, encoder: Encoder) -> None:
    train, test = train_and_test(8, 16, seed=0)
    prompted = [PromptedModel(model, model.get_input_embeddings().weight[10:14]) for _ in range(2)]
    learners = [Learner("", each, each.prompt) for each in prompted]
    for learner in learners:
        for _ in range(12):
            learner.step(encoder.batch(train))
        learner.evaluate([encoder.batch(test)], encoder.label_tokens)
    one, other = learners
    assert one.losses[-1] < one.losses[0]
    assert one.losses == other.losses
    assert largest_difference(one, other) == 0
    assert one.accuracies == other.accuracies
    assert 0 <= one.accuracies[0] <= 1
    other.losses[3] *= 1.5
    assert largest_difference(one, other) == pytest.approx(1 / 3)


def test_every_text_comes_once_before_any_comes_again() -> None:
    texts = train_and_test(10, 1, seed=0)[0]
    batches = [batch for batch, _ in zip(shuffled(texts, 4, seed=5), range(5), strict=False)]
    seen = [text for batch in batches for text in batch]
    for epoch in (seen[:10], seen[10:]):
        assert {text.text for text in epoch} == {text.text for text in texts}
    assert seen[:10] != seen[10:]
    assert batches == [batch for batch, _ in zip(shuffled(texts, 4, seed=5), range(5), strict=False)]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "losses.png"
    check_plottable(file)
    plot_losses(file, {"swarm": [3.0, 2.0, 1.0], "local": [3.0, 2.0, 1.1]}, "a title")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", ["losses.pdf", "no/such/folder/losses.png"])
def test_a_plot_that_cannot_be_written_is_an_error_at_once(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="PNG" if file.endswith("pdf") else "cannot write"):
        check_plottable(Path(file))


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"petswarm\[plot\]"):
        check_plottable(Path("losses.png"))


def test_a_swarm_learns_what_a_local_model_learns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program, on a model that is tiny: three servers, both trainings, the table."""
    shown: list[Learner] = []
    monkeypatch.setattr(program, "demo_model_folder", lambda progress: folder)
    monkeypatch.setattr(program, "NUM_TEST", 20)
    show = program.show
    monkeypatch.setattr(program, "show", lambda console, *learners: (shown.extend(learners), show(console, *learners)))
    with torch.random.fork_rng():
        assert run(monkeypatch, "--steps", "5", "--batch-size", "4", "--prompt-tokens", "3") == 0
    remote, local = shown
    assert (remote.name, local.name) == ("swarm", "local")
    assert len(remote.losses) == 5
    assert remote.losses[-1] != remote.losses[0]
    assert largest_difference(remote, local) < 1e-4
    torch.testing.assert_close(remote.prompt, local.prompt, rtol=1e-3, atol=1e-3)
    assert remote.accuracies == local.accuracies
    assert "A step over the swarm takes" in capsys.readouterr().out


def test_bad_arguments_are_errors_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--steps", "0"], ["--plot", "no/such/folder/losses.png"]):
        assert run(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The program's exit code."""
    monkeypatch.setattr("sys.argv", ["finetune_prompt", *arguments])
    with pytest.raises(SystemExit) as exit_:
        program.main()
    return int(exit_.value.code or 0)
