"""The model families that are tested, and what each needs beyond the general way. A row of defaults needs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What transformers' `base_model_pp_plan` does not say of a family's base model.

    base: where it is in the causal model, if `base_model_prefix` does not say; base_class: its class, if it is not
        what `AutoModel` makes.
    parts: its embeddings, its list of blocks, its final norm; None: as the plan says, or as almost all call them.
    added: modules whose output it adds to the embeddings. applied: modules that it passes them, or the output of its
        final norm, through. Both are the client's, and do nothing on a server.
    tuples: its blocks return tuples, of which the hidden states are the first.
    arguments: what it passes to its blocks by position.
    note: what it needs, in words.
    every_expert: its experts compute every token, those that were not chosen from zeros.
    linear: the name of its own class of linear layers, if it has one that computes what torch's does.
    """

    base: str | None = None
    base_class: str | None = None
    parts: tuple[str, str, str] | None = None
    added: tuple[str, ...] = ()
    applied: tuple[str, ...] = ()
    tuples: bool = False
    arguments: tuple[str, ...] = ("hidden_states", "attention_mask", "past_key_values", "position_ids")
    every_expert: bool = False
    linear: str | None = None
    note: str = ""


_BY_THEIR_PLAN = """
apertus arcee bitnet cohere cohere2 cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo
gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_oss granite granite_swa granitemoe
granitemoeshared helium hunyuan_v1_dense hyperclovax internlm3 jais2 llama minimax_m2 ministral
ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen3 qwen3_moe
seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
"""

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_BY_THEIR_PLAN.split(), Family()),
    "bloom": Family(
        parts=("word_embeddings", "h", "ln_f"),
        applied=("word_embeddings_layernorm",),
        tuples=True,
        note="alibi in an attention function of its own; the norm of its embeddings is the client's",
    ),
    "falcon": Family(
        parts=("word_embeddings", "h", "ln_f"),
        tuples=True,
        linear="FalconLinear",
        note="alibi, and keys and values stored once for heads that share them, in an attention function of its own",
    ),
    **dict.fromkeys(
        ("gpt2", "gpt_bigcode"),
        Family(
            parts=("wte", "h", "ln_f"),
            added=("wpe",),
            arguments=("hidden_states", "past_key_values", "attention_mask", "encoder_hidden_states"),
            note="embeddings of positions are the client's",
        ),
    ),
    "llama4_text": Family(
        base="model", every_expert=True, note="chunked attention; queries that are scaled by their position"
    ),
    "opt": Family(
        base="model.decoder",
        base_class="OPTDecoder",
        parts=("embed_tokens", "layers", "final_layer_norm"),
        added=("embed_positions",),
        applied=("project_in", "project_out"),
        note="embeddings of positions, and projections around the blocks, are the client's",
    ),
    "persimmon": Family(parts=("embed_tokens", "layers", "final_layernorm"), note="the name of its norm"),
    **dict.fromkeys(("phimoe", "qwen2_moe"), Family(note="windows that only its masks tell of")),
}

#: Model types whose spans are tested to give the whole model's logits (tests/test_families.py).
TESTED = frozenset(FAMILIES)
