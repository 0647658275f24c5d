"""The models that tests run on: folders that plain transformers can read too."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from swarm.scripts.local_swarm import LocalSwarm

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell lets what it starts in the background ignore Ctrl-C, and children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that processes which share the files end at about the same time."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent not in (here, here / "scripts"))


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 blocks: hidden 64, 4 heads, 2 key-value heads, 256 tokens, float32, never ends a text.

    Its weights are large enough for greedy outputs of some 50 distinct tokens in 64 (the library's default range gives
    one token over and over, which hides errors of position and cache). The best logit leads by 1e-3 or more.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of 256 words (`w4` ... `w255` and a few for its chat template)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    shutil.copytree(tiny_llama_folder, folder)
    words = ["<unknown>", "<user>", "<assistant>", "<end>", *(f"w{number}" for number in range(4, 256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=(
            "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The real SmolLM2-135M-Instruct in float32, from the package that ships it; converted once and cached."""
    from swarm.scripts.models import demo_model_folder

    return demo_model_folder()


@pytest.fixture
def connect(swarm: LocalSwarm, tiny_llama_folder: Path) -> Iterator[Callable[..., Any]]:
    """Makes clients of the module's own `swarm` fixture; its keywords are those of `from_pretrained`."""
    from swarm import AutoSwarmModelForCausalLM

    with contextlib.ExitStack() as stack:

        def connect(**settings: Any) -> Any:
            model = AutoSwarmModelForCausalLM.from_pretrained(
                tiny_llama_folder, initial_peers=swarm.initial_peers, **settings
            )
            stack.callback(model.close)
            return model

        yield connect


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch wait for each other by spinning: beside server processes on few cores, two take tenfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
