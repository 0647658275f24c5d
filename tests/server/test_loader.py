"""What a load takes at its peak, in a process of its own, and what a loaded block takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import saved_model, tiny_config

from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import ModelNotFound
from swarm.server.loader import load_span

NUM_BLOCKS = 12
#: Of one block: attention 2 x 1024x1024 + 2 x 256x1024, MLP 3 x 2816x1024, norms 2 x 1024.
PARAMETERS = 2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 2816 * 1024 + 2 * 1024

#: Loads a first block, so that what is imported on the way is no part of the peak, then the whole span.
CHILD = """
import gc, json, sys
import torch
from swarm.checkpoint import open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.loader import load_span, loaded_bytes

folder, dtype, quantization = sys.argv[1:]
torch.set_num_threads(1)

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def load(num_blocks):
    blocks = BlockSpan(start=0, end=num_blocks)
    return load_span(
        checkpoint, blocks, dtype=getattr(torch, dtype), quantization=quantization, device=torch.device("cpu")
    )

checkpoint = open_checkpoint(folder)
one_block = loaded_bytes(load(1))
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak is the present
before = memory("VmRSS:")
span = load(checkpoint.config.num_hidden_layers)
peak, after = memory("VmHWM:") - before, memory("VmRSS:") - before
print(json.dumps({"peak": peak, "after": after, "span": loaded_bytes(span), "one_block": one_block}))
"""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose blocks take 45 MB each, stored in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=2816,
        vocab_size=64,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("models") / "big"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def loading(folder: Path, dtype: str, quantization: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), dtype, quantization], capture_output=True, text=True, check=True
    )
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization", "bits"),
    [
        ("float32", "none", 32),
        ("bfloat16", "none", 16),
        ("float32", "int8", 8),
        ("bfloat16", "int8", 8),
        ("float32", "nf4", 4.5),
        ("bfloat16", "nf4", 4.5),
    ],
)
def test_the_peak_of_a_load_is_the_span_and_less_than_two_blocks(
    big_folder: Path, dtype: str, quantization: str, bits: float
) -> None:
    found = loading(big_folder, dtype, quantization)
    assert found["span"] == pytest.approx(NUM_BLOCKS * PARAMETERS * bits / 8, rel=0.07)
    assert found["span"] == pytest.approx(NUM_BLOCKS * found["one_block"], rel=1e-6)
    assert found["peak"] <= found["span"] + 2 * PARAMETERS * 4
    assert found["after"] <= 1.05 * found["span"]  # nothing of the way there is left


def test_blocks_loaded_as_they_are_stored_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swarm.checkpoint import open_checkpoint
    from swarm.data_structures import BlockSpan
    from swarm.server.loader import load_span

    config: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config, intermediate_size=64, vocab_size=8, dtype="float32")).save_pretrained(
        tmp_path
    )
    checkpoint = open_checkpoint(str(tmp_path))

    def mapped(dtype: torch.dtype, quantization: Any) -> int:
        """How many tensors of blocks 1 and 2 lie in the mapped file."""
        blocks = BlockSpan(start=1, end=3)
        span = load_span(checkpoint, blocks, dtype=dtype, quantization=quantization, device=torch.device("cpu"))
        ranges = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith("model.safetensors"):
                begin, end = line.split()[0].split("-")
                ranges.append(range(int(begin, 16), int(end, 16)))
        parameters = list(span._model.layers.parameters())  # type: ignore[union-attr]
        return sum(any(parameter.data_ptr() in place for place in ranges) for parameter in parameters)

    monkeypatch.setattr("swarm.server.packed_linear._is_faster", lambda layers: True)
    assert mapped(torch.float32, "none") == 0
    monkeypatch.setattr("swarm.server.packed_linear._is_faster", lambda layers: False)
    assert mapped(torch.float32, "none") == 2 * 9
    assert mapped(torch.bfloat16, "none") == 0
    assert mapped(torch.float32, "int8") == 0  # norms neither: one of them would keep the file in memory


def test_of_a_mixture_only_the_spans_experts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has a tensor for each expert, which the library fuses."""
    _, checkpoint = saved_model(tiny_config("mixtral"), tmp_path)
    seen: list[str] = []
    read = Checkpoint.read

    def noting(self: Checkpoint, names: Any) -> Any:
        seen.extend(names)
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "read", noting)
    blocks = BlockSpan(start=2, end=4)
    load_span(checkpoint, blocks, dtype=torch.float32, quantization="none", device=torch.device("cpu"))
    wanted = {name for name in checkpoint.tensor_names() if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert any(".experts.3." in name for name in wanted)
    assert sorted(seen) == sorted(wanted)  # each of them once


def test_experts_that_were_fused_are_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what may be a view of the file is, where the other layers are packed: experts are most of a mixture."""
    _, checkpoint = saved_model(tiny_config("mixtral"), tmp_path)
    copied: list[int] = []
    monkeypatch.setattr("swarm.server.packed_linear._is_faster", lambda layers: True)
    for module in ("loader", "block_loader"):
        monkeypatch.setattr(
            f"swarm.server.{module}.let_go_of_file", lambda views: copied.extend(view.dim() for view in views)
        )
    blocks = BlockSpan(start=2, end=3)
    load_span(checkpoint, blocks, dtype=torch.float32, quantization="none", device=torch.device("cpu"))
    assert copied and 3 not in copied


def test_a_tensor_that_a_checkpoint_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = saved_model(tiny_config("llama"), tmp_path)
    names = checkpoint.tensor_names() - {"model.layers.3.mlp.up_proj.weight"}
    monkeypatch.setattr(Checkpoint, "tensor_names", lambda _: names)
    with pytest.raises(ModelNotFound, match=r"no tensors for these of block 3: layers\.0\.mlp\.up_proj\.weight"):
        load_span(
            checkpoint,
            BlockSpan(start=2, end=4),
            dtype=torch.float32,
            quantization="none",
            device=torch.device("cpu"),
        )
