"""What cannot be used is refused in one sentence that names what is wrong: one test for each reason."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from dense_adapters import FINGERPRINT, plain_base
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from swarm.errors import AdapterError
from swarm.server.adapters.importing import import_adapter, read_manifest

Tensors = dict[str, torch.Tensor]
PEFT = ("adapter_config.json", "adapter_model.safetensors")
HUB = ("adapter_config.json", "adapter.safetensors")
OWN = ("petswarm_adapter.json", "adapter.safetensors")


def write(folder: Path, files: tuple[str, str], config: Any, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / files[0]).write_text(json.dumps(config))
    save_file(tensors, folder / files[1])
    return folder


@pytest.fixture
def refused(tmp_path: Path, tiny_model: Any) -> Callable[..., None]:
    """Writes an adapter and expects that importing it fails with these words, in one sentence."""

    def refused(files: tuple[str, str], config: Any, tensors: Tensors, words: str) -> None:
        folder = write(tmp_path / "pet", files, config, tensors)
        with pytest.raises(AdapterError, match=re.escape(words)) as caught:
            import_adapter(folder, plain_base(tiny_model))
        assert "\n" not in str(caught.value)

    return refused


def lora_tensors(paths: tuple[str, ...] = ("self_attn.q_proj",), rank: int = 4, size: int = 64) -> Tensors:
    tensors = {}
    for block in range(8):
        for path in paths:
            name = f"base_model.model.model.layers.{block}.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.ones(rank, size)
            tensors[f"{name}.lora_B.weight"] = torch.ones(size, rank)
    return tensors


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_adapters_that_are_spoilt_here_are_good(tmp_path: Path, tiny_model: Any) -> None:
    import_adapter(write(tmp_path / "lora", PEFT, LORA, lora_tensors()), plain_base(tiny_model))
    import_adapter(write(tmp_path / "own", OWN, OWN_CONFIG, own_tensors()), plain_base(tiny_model))
    import_adapter(write(tmp_path / "hub", HUB, hub(), hub_tensors()), plain_base(tiny_model))


def check_files(folder: Path, words: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(words)) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    check_files(tmp_path / "nowhere", "there is no adapter folder")


def test_no_config(tmp_path: Path) -> None:
    check_files(tmp_path, "is no adapter: it has neither petswarm_adapter.json nor adapter_config.json")


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "pytorch_adapter.bin"])
def test_pickles_only(tmp_path: Path, pickle: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n.")
    check_files(tmp_path, f"as a pickle ({pickle}), which is never loaded")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    check_files(tmp_path, "has no weights: adapter_model.safetensors or")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is damaged"), ("[]", "holds no JSON object"), ("[" * 100_000, "is damaged"), ("\xff", "is damaged")],
    ids=["cut off", "a list", "deep", "no UTF-8"],
)
def test_damaged_config(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, PEFT, LORA, lora_tensors())
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    check_files(tmp_path, "adapter_config.json is damaged" if words == "is damaged" else words)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, PEFT, LORA, lora_tensors())
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(10_000_000)
    check_files(tmp_path, "is larger than")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_damaged_weights(tmp_path: Path, size: int) -> None:
    """Cut off anywhere."""
    write(tmp_path, PEFT, LORA, lora_tensors())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    check_files(tmp_path, "adapter_model.safetensors is damaged or no safetensors file")


def test_neither_peft_nor_adapterhub(tmp_path: Path) -> None:
    check_files(write(tmp_path, PEFT, {"r": 4}, lora_tensors()), "neither peft's, which has a peft_type")


@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(["peft", "hub", "own"]), st.booleans())
def test_whatever_the_bytes_are_they_are_refused_or_read(
    tiny_model: Any, tmp_path_factory: pytest.TempPathFactory, seed: int, changes: int, kind: str, in_config: bool
) -> None:
    """Some bytes of one file changed at random."""
    files, config, tensors = {
        "peft": (PEFT, LORA, lora_tensors()),
        "hub": (HUB, hub(), hub_tensors()),
        "own": (OWN, OWN_CONFIG, own_tensors()),
    }[kind]
    folder = write(tmp_path_factory.mktemp("fuzz"), files, config, tensors)
    path = folder / files[0 if in_config else 1]
    data, random = bytearray(path.read_bytes()), Random(seed)
    for _ in range(changes):
        data[random.randrange(min(len(data), 4000))] = random.randrange(256)
    path.write_bytes(data)
    with contextlib.suppress(AdapterError):
        read_manifest(folder)
        import_adapter(folder, plain_base(tiny_model))


# --- peft: kinds and fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "LOHA", "VERA", "OFT", "XLORA", "made up", 3, None])
def test_a_kind_that_is_not_implemented(tmp_path: Path, kind: object) -> None:
    folder = write(tmp_path, PEFT, {"peft_type": kind}, lora_tensors())
    check_files(folder, f"is of peft's kind {kind!r}, which is not implemented; those that are: ADALORA, IA3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [5]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("loftq_config", {"loftq_bits": 4}),
        ("lora_ga_config", {"scale": "stable"}),
        ("megatron_config", {"a": 1}),
        ("invented_later", 7),
    ],
)
def test_a_field_that_is_not_implemented(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path, PEFT, LORA | {field: value}, lora_tensors())
    check_files(folder, f"sets {field} to {json.dumps(value)}")


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_field_that_is_switched_off_is_no_matter(tmp_path: Path, value: object) -> None:
    assert read_manifest(write(tmp_path, PEFT, LORA | {"invented_later": value}, lora_tensors())).kind == "lora"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base(tmp_path: Path, init: str) -> None:
    folder = write(tmp_path, PEFT, LORA | {"init_lora_weights": init}, lora_tensors())
    check_files(folder, "is not valid: init_lora_weights")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("r", 10**9),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e999),
        ("lora_alpha", 10**400),
        ("bias", "some"),
        ("target_modules", ["q"] * 5000),
    ],
)
def test_a_field_of_no_sense(tmp_path: Path, field: str, value: object) -> None:
    check_files(write(tmp_path, PEFT, LORA | {field: value}, lora_tensors()), f"is not valid: {field}")


# --- peft: tensors ---------------------------------------------------------------------------------------------------


def test_a_layer_is_missing(refused: Callable[..., None]) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if "layers.5." not in name}
    refused(
        PEFT, LORA, tensors, "has no tensors for self_attn.q_proj of block 5, a linear layer that its target_modules"
    )


def test_half_a_layer_is_missing(refused: Callable[..., None]) -> None:
    tensors = lora_tensors()
    del tensors[f"{Q0}.lora_B.weight"]
    refused(PEFT, LORA, tensors, "lacks lora_B.weight of self_attn.q_proj in block 0")


def test_a_layer_is_not_named_by_the_config(refused: Callable[..., None]) -> None:
    tensors = lora_tensors(("self_attn.q_proj", "self_attn.o_proj"))
    refused(PEFT, LORA, tensors, "has tensors for self_attn.o_proj of block 0, which its target_modules do not name")


def test_no_targets(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA | {"target_modules": None}, lora_tensors(), "target_modules is empty")


def test_no_tensors(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA, {}, "has no tensors that change a module")


def test_a_model_with_more_blocks(refused: Callable[..., None]) -> None:
    tensors = lora_tensors()
    tensors[Q0.replace(".0.", ".8.") + ".lora_A.weight"] = torch.ones(4, 64)
    refused(PEFT, LORA, tensors, "but this model has 8 blocks")


def test_a_module_that_the_model_has_not(refused: Callable[..., None]) -> None:
    config = LORA | {"target_modules": ["q_proj", "c_attn"]}
    refused(PEFT, config, lora_tensors(("self_attn.q_proj", "self_attn.c_attn")), "has no module 'self_attn.c_attn'")


def test_a_module_that_is_not_linear(refused: Callable[..., None]) -> None:
    config = LORA | {"target_modules": ["input_layernorm"]}
    refused(PEFT, config, lora_tensors(("input_layernorm",)), "is a LlamaRMSNorm, not a linear layer")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight", "model.norm.weight", "something"]
)
def test_what_the_client_keeps(refused: Callable[..., None], name: str) -> None:
    tensors = lora_tensors() | {f"base_model.model.{name}": torch.ones(4, 64)}
    refused(PEFT, LORA, tensors, f"changes {name}, which lies outside the blocks")


def test_another_size(refused: Callable[..., None]) -> None:
    words = f"{Q0}.lora_A.weight of the adapter pet has the shape [4, 32], but this model needs [4, 64]"
    refused(PEFT, LORA, lora_tensors(size=32), words)


def test_another_rank(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA, lora_tensors(rank=8), "has the shape [8, 64], but this model needs [4, 64]")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(refused: Callable[..., None], number: float) -> None:
    tensors = lora_tensors()
    tensors[f"{Q0}.lora_A.weight"][1, 2] = number
    refused(PEFT, LORA, tensors, f"{Q0}.lora_A.weight of the adapter pet holds numbers that are not finite")


def test_numbers_too_large_for_the_spans_dtype(tmp_path: Path, tiny_model: Any) -> None:
    import copy

    folder = write(tmp_path, PEFT, LORA | {"lora_alpha": 1e6}, lora_tensors())
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        import_adapter(folder, plain_base(copy.deepcopy(tiny_model).half()))


def test_whole_numbers(refused: Callable[..., None]) -> None:
    tensors = lora_tensors() | {f"{Q0}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}
    refused(PEFT, LORA, tensors, "is of type I8, not floating point")


def test_a_tensor_that_nothing_explains(refused: Callable[..., None]) -> None:
    tensors = lora_tensors() | {f"{Q0}.lora_C.weight": torch.ones(1)}
    refused(PEFT, LORA, tensors, "has a tensor that its kind does not explain")


def test_a_head_is_saved_along(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA | {"modules_to_save": ["score"]}, lora_tensors(), "saves 'score' along (modules_to_save)")


def test_a_whole_linear_layer_is_saved_along(refused: Callable[..., None]) -> None:
    tensors = lora_tensors()
    for block in range(8):
        tensors[f"base_model.model.model.layers.{block}.mlp.up_proj.weight"] = torch.ones(128, 64)
    refused(
        PEFT, LORA | {"modules_to_save": ["up_proj"]}, tensors, "replaces the whole weight of mlp.up_proj in block 0"
    )


def test_a_bias_where_the_model_has_none(refused: Callable[..., None]) -> None:
    tensors = lora_tensors() | {f"{Q0}.base_layer.bias": torch.ones(64)}
    refused(PEFT, LORA | {"bias": "all"}, tensors, "has a bias for self_attn.q_proj of block 0, which has none")


def test_dora_without_its_magnitudes(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA | {"use_dora": True}, lora_tensors(), "do not fit use_dora")


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(.*)*q_proj", r"(q)\1", "q.*p.*r.*o.*j", "(?:q|k)_proj", ".?" * 40, "(.|.)(.|.)(.|.)(.|.)q"]
)
def test_a_pattern_that_could_take_forever(refused: Callable[..., None], pattern: str) -> None:
    refused(PEFT, LORA | {"rank_pattern": {pattern: 4}}, lora_tensors(), "is too complicated to be evaluated safely")


def test_a_pattern_that_is_none(refused: Callable[..., None]) -> None:
    refused(PEFT, LORA | {"alpha_pattern": {"(q": 4}}, lora_tensors(), "is no regular expression")


def test_too_many_patterns(refused: Callable[..., None]) -> None:
    patterns = {f"q[{number}]": 4 for number in range(65)}
    refused(PEFT, LORA | {"rank_pattern": patterns}, lora_tensors(), "has 65 regular expressions")


def test_a_name_that_could_write_over_a_terminal(refused: Callable[..., None]) -> None:
    tensors = lora_tensors() | {"\x1b[2J\n": torch.ones(1)}
    refused(PEFT, LORA, tensors, "whose name is not printable")


def test_a_field_that_could_write_over_a_terminal(refused: Callable[..., None]) -> None:
    refused(OWN, OWN_CONFIG | {"a\nb": 1}, own_tensors(), "is not valid: 'a\\nb'")


def test_other_names_of_layers(refused: Callable[..., None]) -> None:
    config = LORA | {"layers_to_transform": [0], "layers_pattern": "h"}
    refused(PEFT, config, lora_tensors(), "counts its layers by ['h'], but this model's are 'layers'")


def test_ia3_of_another_size(refused: Callable[..., None]) -> None:
    config = {"peft_type": "IA3", "target_modules": ["q_proj"]}
    tensors = {f"{Q0.replace('.0.', f'.{block}.')}.ia3_l": torch.ones(32, 1) for block in range(8)}
    refused(PEFT, config, tensors, "has the shape [32, 1], but this model needs [64, 1], or [1, 64]")


def test_ln_tuning_of_the_last_norm(refused: Callable[..., None]) -> None:
    config = {"peft_type": "LN_TUNING", "target_modules": ["norm"]}
    name = "base_model.model.model.norm.ln_tuning_layers.weight"
    refused(PEFT, config, {name: torch.ones(64)}, "changes model.norm.ln_tuning_layers.weight, which lies outside")


def test_ln_tuning_of_another_size(refused: Callable[..., None]) -> None:
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
    name = "base_model.model.model.layers.{}.input_layernorm.ln_tuning_layers.weight"
    tensors = {name.format(block): torch.ones(32) for block in range(8)}
    refused(PEFT, config, tensors, "has the shape [32], but this model's has [64]")


@pytest.mark.parametrize(
    ("index", "words"), [(64, "points outside the 64 x 64 entries"), (-1, "points outside"), (0, "is given twice")]
)
def test_shira_with_wrong_indices(refused: Callable[..., None], index: int, words: str) -> None:
    config = {"peft_type": "SHIRA", "target_modules": ["q_proj"], "r": 1}
    tensors = {}
    for block in range(8):
        indices = torch.stack([torch.arange(128) // 64, torch.arange(128) % 64]).to(torch.int32)
        indices[0 if index else 1, 1] = index
        tensors[f"{Q0.replace('.0.', f'.{block}.')}.shira_indices"] = indices
        tensors[f"{Q0.replace('.0.', f'.{block}.')}.shira_weight"] = torch.ones(128)
    refused(PEFT, config, tensors, words)


def test_adalora_without_the_rank_of_a_layer(refused: Callable[..., None]) -> None:
    config = {"peft_type": "ADALORA", "target_modules": ["q_proj"], "init_r": 4, "rank_pattern": {}}
    tensors = {}
    for block in range(8):
        name = Q0.replace(".0.", f".{block}.")
        tensors |= {f"{name}.lora_A": torch.ones(4, 64), f"{name}.lora_B": torch.ones(64, 4)}
        tensors[f"{name}.lora_E"] = torch.ones(4, 1)
    refused(PEFT, config, tensors, "lacks model.layers.0.self_attn.q_proj.lora_E")


PREFIX = {
    "peft_type": "PREFIX_TUNING",
    "num_virtual_tokens": 3,
    "token_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 8,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 4, "token_dim": 64}, "has a prefix for 4 layers, but this model has 8"),
        ({"num_attention_heads": 4}, "has 4 heads of 8, but this model's keys have 2 of 16"),
        ({"num_attention_heads": 3}, "not divisible by 3 heads"),
        ({"num_virtual_tokens": 4}, "has the shape [3, 512], but this model needs [4, 512]"),
        ({"num_transformer_submodules": 2}, "is not valid: num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, "saves other modules along"),
    ],
    ids=str,
)
def test_a_prefix_that_does_not_fit(refused: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    refused(PEFT, PREFIX | changes, {"prompt_embeddings": torch.ones(3, 512)}, words)


# --- AdapterHub ------------------------------------------------------------------------------------------------------


def hub(**changes: Any) -> dict[str, Any]:
    """A sequential bottleneck behind the MLP; changes: of the inner configuration."""
    inner = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"}
    return {
        "name": "n",
        "model_class": "LlamaAdapterModel",
        "model_type": "llama",
        "hidden_size": 64,
        "version": "adapters.1.3.0",
        "config": inner | changes,
    }


def hub_tensors() -> Tensors:
    tensors = {}
    for block in range(8):
        name = f"model.layers.{block}.output_adapters.adapters.n"
        tensors[f"{name}.adapter_down.0.weight"] = torch.ones(4, 64)
        tensors[f"{name}.adapter_down.0.bias"] = torch.ones(4)
        tensors[f"{name}.adapter_up.weight"] = torch.ones(64, 4)
        tensors[f"{name}.adapter_up.bias"] = torch.ones(64)
    return tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_parallel": True}, "sets is_parallel to true, which is not implemented"),
        ({"ln_before": True}, "sets ln_before to true"),
        ({"ln_after": True}, "sets ln_after to true"),
        ({"use_gating": True}, "sets use_gating to true"),
        ({"phm_layer": True}, "sets phm_layer to true"),
        ({"inv_adapter": "nice"}, 'sets inv_adapter to "nice"'),
        ({"cross_adapter": True}, "sets cross_adapter to true"),
        ({"invented_later": 1}, "sets invented_later to 1"),
        ({"non_linearity": "leakyrelu"}, "uses the activation 'leakyrelu'; those that work"),
        ({"original_ln_after": False}, "bottlenecks behind the MLP with original_ln_before=False"),
        (
            {"original_ln_before": True, "mh_adapter": True},
            "bottlenecks behind the attention with original_ln_before=True",
        ),
        ({"residual_before_ln": "post_add"}, "residual_before_ln=post_add, which is not implemented"),
        ({"output_adapter": False}, "changes nothing"),
        ({"architecture": "union"}, 'architecture "union", which is not implemented'),
        ({"architecture": "prompt_tuning"}, 'architecture "prompt_tuning"'),
        ({"architecture": "reft"}, 'architecture "reft"'),
        ({"architecture": ["lora"]}, "architecture"),
        ({"architecture": "lora", "use_dora": True}, "use_dora to true"),
        ({"architecture": "lora", "vera_d": 0.1}, "vera_d to 0.1"),
        ({"architecture": "lora", "composition_mode": "scale"}, "r must be 1, not 8"),
    ],
    ids=str,
)
def test_adapterhub_settings_that_are_not_implemented(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    settings = hub(**changes)
    if "architecture" in changes:
        settings["config"] = changes
    check_files(write(tmp_path, HUB, settings, hub_tensors()), words)


def test_adapterhubs_first_gelu(tmp_path: Path) -> None:
    """Without a version it was the approximate one."""
    config = hub(non_linearity="gelu") | {"version": None}
    check_files(write(tmp_path, HUB, config, hub_tensors()), "uses the activation 'gelu_new'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "was made for a model of type bert, but this is llama"),
        ({"hidden_size": 32}, "is for hidden size 32, but this model has 64"),
        ({"name": "other"}, "has a tensor that its configuration does not explain"),
    ],
    ids=str,
)
def test_adapterhub_for_another_model(refused: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    refused(HUB, hub() | changes, hub_tensors(), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduction_factor": 8}, "has the shape [64, 4], but this model needs [64, 8]"),
        ({"reduction_factor": 0}, "must be 0.001 at least, not 0"),
        ({"reduction_factor": {"3": 16}}, "gives no reduction_factor for block 0"),
        ({"mh_adapter": True}, "lacks the tensors of attention_adapters in block 0"),
        ({"leave_out": [2]}, "has tensors for output_adapters in block 2"),
        ({"leave_out": [9]}, "leaves out blocks that this model has not"),
        ({"scaling": "learned"}, "lacks scaling of output_adapters in block 0"),
    ],
    ids=str,
)
def test_adapterhub_tensors_that_do_not_fit(refused: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    refused(HUB, hub(**changes), hub_tensors(), words)


def test_an_unknown_version_of_adapterhub(tmp_path: Path) -> None:
    config = hub() | {"version": "adapters.new", "config": {"architecture": "lora"}}
    check_files(write(tmp_path, HUB, config, hub_tensors()), "unknown version of its library: 'adapters.new'")


# --- our own format --------------------------------------------------------------------------------------------------

OWN_CONFIG = {"format": 1, "kind": "x", "base": FINGERPRINT, "num_blocks": 8, "bottlenecks": {"mlp": "relu"}}


def own_tensors() -> Tensors:
    return {
        "blocks.0.mlp.bottleneck.down": torch.ones(2, 64),
        "blocks.0.mlp.bottleneck.up": torch.ones(64, 2),
        "blocks.1.mlp.up_proj.sparse.indices": torch.tensor([3, 1]),
        "blocks.1.mlp.up_proj.sparse.values": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "ef" * 32}, "was made for the weights efefefefefefefef..., but these are cdcdcdcdcdcdcdcd..."),
        ({"base": "ef"}, "is not valid: base"),
        ({"format": 2}, "is not valid: format"),
        ({"kind": "Diff Pruning"}, "is not valid: kind"),
        ({"num_blocks": 4}, "is for 4 blocks, but this model has 8"),
        ({"bottlenecks": {"mlp": "swish"}}, "is not valid: bottlenecks.mlp"),
        ({"bottlenecks": {}}, "does not say the activation of the bottleneck 'mlp'"),
        ({"more": 1}, "is not valid: more"),
    ],
    ids=str,
)
def test_settings_of_the_own_format(refused: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    refused(OWN, OWN_CONFIG | changes, own_tensors(), words)


UP = "blocks.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("blocks.8.mlp.up_proj.bias_out", torch.ones(128), "for block 8, but this model has 8 blocks"),
        ("blocks.0.mlp.up_proj.bias", torch.ones(128), "whose name means nothing: blocks.0.mlp.up_proj.bias"),
        ("mlp.up_proj.bias_out", torch.ones(128), "whose name means nothing"),
        (f"{UP}.bias_out", torch.ones(64), "has the shape [64], but this model needs [128]"),
        ("blocks.0.mlp.bias_out", torch.ones(64), "is a LlamaMLP, not a linear layer"),
        ("blocks.0.mlp.up_proj.norm.weight", torch.ones(64), "is a Linear, not a norm"),
        ("blocks.0.input_layernorm.norm.bias", torch.ones(64), "a bias, which this model's has not"),
        (f"{UP}.low_rank.down", torch.ones(2, 64), "without low_rank.up beside it"),
        (f"{UP}.mask", torch.ones(128, 8, dtype=torch.uint8), "has both a mask and sparse differences"),
        ("blocks.2.mlp.up_proj.mask", torch.ones(128, 64, dtype=torch.uint8), "but this model needs [128, 8]"),
        ("blocks.2.mlp.up_proj.mask", torch.ones(128, 8), "is of type F32 instead of U8"),
        (f"{UP}.sparse.indices", torch.tensor([3, 3]), "an entry of mlp.up_proj of block 1 is given twice"),
        (f"{UP}.sparse.indices", torch.tensor([3, 64 * 128]), "lies outside its 128 x 64 entries"),
        (f"{UP}.sparse.indices", torch.tensor([-1, 3]), "lies outside its 128 x 64 entries"),
        (f"{UP}.sparse.indices", torch.tensor(3), "is a single number"),
        (f"{UP}.sparse.indices", torch.tensor([1.0, 2.0]), "is of type F32 instead of I32 or I64"),
        (f"{UP}.sparse.values", torch.ones(3), "has the shape [3], but this model needs [2]"),
        ("blocks.0.mlp.bottleneck.down", torch.ones(2, 32), "has the shape [2, 32], but this model needs [2, 64]"),
        ("blocks.0.mlp.bottleneck.up", torch.ones(64, 3), "has the shape [64, 3], but this model needs [64, 2]"),
        ("prefix.keys", torch.ones(8, 2, 3, 16), "has prefix.keys alone"),
    ],
)
def test_tensors_of_the_own_format(refused: Callable[..., None], name: str, tensor: torch.Tensor, words: str) -> None:
    refused(OWN, OWN_CONFIG, own_tensors() | {name: tensor}, words)


def test_a_bottleneck_of_rank_0(refused: Callable[..., None]) -> None:
    tensors = {"blocks.0.mlp.bottleneck.down": torch.ones(0, 64), "blocks.0.mlp.bottleneck.up": torch.ones(64, 0)}
    refused(OWN, OWN_CONFIG, tensors, "has a bottleneck of rank 0 behind 'mlp' of block 0")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("mlp.up_proj", "has a bottleneck for 64 values behind mlp.up_proj of block 0, which gives 128"),
        ("mlp.act_fn", "may stand behind the block, a child of it or a linear layer"),
        ("mlp.experts", "has no module 'mlp.experts'"),
    ],
)
def test_a_bottleneck_where_no_hidden_states_are(refused: Callable[..., None], path: str, words: str) -> None:
    tensors = {
        f"blocks.0.{path}.bottleneck.down": torch.ones(2, 64),
        f"blocks.0.{path}.bottleneck.up": torch.ones(64, 2),
    }
    refused(OWN, OWN_CONFIG | {"bottlenecks": {path: "relu"}}, tensors, words)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 4, 3, 16), "has 4 heads of 16, but this model's keys have 2 of 16"),
        ((4, 2, 3, 16), "instead of [8 blocks, heads, tokens, head_dim]"),
        ((8, 2, 0, 16), "instead of [8 blocks, heads, tokens, head_dim]"),
    ],
)
def test_a_prefix_of_the_own_format(refused: Callable[..., None], shape: tuple[int, ...], words: str) -> None:
    refused(OWN, OWN_CONFIG, {"prefix.keys": torch.ones(shape), "prefix.values": torch.ones(shape)}, words)


# --- small files that stand for large adapters ------------------------------------------------------------------------


def test_a_mask_that_takes_more_than_there_is_for_adapters(tmp_path: Path, tiny_model: Any) -> None:
    """A bit of the file becomes up to eight bytes."""
    tensors = {f"blocks.{block}.mlp.up_proj.mask": torch.zeros(128, 8, dtype=torch.uint8) for block in range(8)}
    folder = write(tmp_path / "mask", OWN, OWN_CONFIG, tensors)
    size = 8 * 8 * 128 * 64
    assert size >= import_adapter(folder, plain_base(tiny_model)).nbytes > 40 * (folder / OWN[1]).stat().st_size
    import_adapter(folder, replace(plain_base(tiny_model), most_bytes=size))
    with pytest.raises(AdapterError, match=rf"all that is for adapters \({size - 1} bytes, --adapter-memory\)"):
        import_adapter(folder, replace(plain_base(tiny_model), most_bytes=size - 1))


def test_a_prefix_that_takes_more_than_there_is_for_adapters(tmp_path: Path, tiny_model: Any) -> None:
    """Nothing is computed before that is known."""
    config = hub() | {"config": {"architecture": "prefix_tuning", "prefix_length": 1000}}
    folder = write(tmp_path / "prefix", HUB, config, {"unread": torch.ones(1)})
    with pytest.raises(AdapterError, match="takes more memory here than all that is for adapters"):
        import_adapter(folder, replace(plain_base(tiny_model), most_bytes=2**20))


def test_a_prefix_of_too_many_tokens(tmp_path: Path) -> None:
    config = hub() | {"config": {"architecture": "prefix_tuning", "prefix_length": 1025}}
    folder = write(tmp_path / "prefix", HUB, config, {"unread": torch.ones(1)})
    with pytest.raises(AdapterError, match="is not valid: prefix_length: Input should be less than or equal to 1024"):
        read_manifest(folder)
