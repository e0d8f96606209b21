"""Infer the role of a layer from its dotted name and its kind.

The tables list the names that transformers, torch and the original Llama code use. A whole segment of the name must
be in a table; the rules are applied in the order of `role_of`.
"""

from __future__ import annotations

import re
from functools import lru_cache

ATTENTION_BLOCKS = frozenset(
    "attn self_attn cross_attn encoder_attn attention self_attention cross_attention crossattention SelfAttention "
    "EncDecAttention LocalSelfAttention TransientGlobalSelfAttention multihead_attn mha linear_attn".split()
)
MLP_BLOCKS = frozenset("mlp ffn feed_forward feedforward DenseReluDense block_sparse_moe experts shared_expert intermediate".split())
HEADS = frozenset(
    "lm_head classifier pre_classifier score qa_outputs embed_out head heads cls proj_out classification_head "
    "output_projection lm_prediction_head fc_out_head seq_relationship".split()
)
ATTENTION_LEAVES = frozenset(
    "q_proj k_proj v_proj o_proj qkv_proj query_key_value Wqkv wq wk wv q_lin k_lin v_lin out_lin query key value "
    "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj query_proj key_proj value_proj pos_key_proj pos_query_proj "
    "c_attn".split()
)
MLP_LEAVES = frozenset(
    "gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc dense_h_to_4h dense_4h_to_h wi wi_0 wi_1 lin1 lin2 "
    "linear1 linear2 w1 w2 w3".split()
)
EMBEDDING_LEAVES = frozenset(
    "embed_tokens word_embeddings position_embeddings token_type_embeddings wte wpe embed_in embed_positions shared "
    "tok_embeddings token_embedding position_embedding relative_attention_bias rel_embeddings positions_embed "
    "tokens_embed embedding embeddings".split()
)
NORM = re.compile(r"(^|_)(norm|ln|layernorm|layer_norm|rmsnorm|layrnorm|batchnorm|bn)(\d*|_.*)$|LayerNorm|RMSNorm|BatchNorm", re.IGNORECASE)

LINEAR_KINDS = frozenset({"Linear", "Conv1D", "Linear4bit", "Linear8bitLt"})
CONV_KINDS = frozenset({"Conv1d", "Conv2d", "Conv3d"})

BLOCK_OF = {
    **dict.fromkeys(MLP_BLOCKS | MLP_LEAVES, "mlp"),
    **dict.fromkeys(ATTENTION_BLOCKS | ATTENTION_LEAVES, "attention"),
}
"""Segment of a name → the block that it implies."""

PATTERNS = ("@attention", "@mlp", "@linear", "@embedding", "@conv", "@head", "@all")


def role_of(name: str, kind: str | None) -> str:
    """Return one of attention, mlp, embedding, conv, head, linear (any other matrix), norm, other."""
    if kind is None:
        return "norm" if _is_norm(name.rpartition(".")[2]) else "other"
    if kind == "Embedding":
        return "embedding"
    if kind in CONV_KINDS:
        return "conv"
    segments = name.split(".")
    if not HEADS.isdisjoint(segments):
        return "head"
    return _block_of(segments) or ("linear" if kind in LINEAR_KINDS else "other")


@lru_cache(maxsize=1024)
def _is_norm(leaf: str) -> bool:
    return NORM.search(leaf) is not None


def _block_of(segments: list[str]) -> str | None:
    """Return the innermost block that a segment implies: BERT's attention.output.dense is attention, its output.dense is mlp."""
    for segment in reversed(segments):
        if segment in BLOCK_OF:
            return BLOCK_OF[segment]
    return "mlp" if segments[-2:] == ["output", "dense"] else None


def matches(pattern: str, role: str, kind: str | None) -> bool:
    """Whether a layer of this role and kind is in `pattern`, one of PATTERNS.

    @linear is every matrix but the output head, @embedding and @conv go by kind, @all is every layer that has a kind.
    """
    if kind is None:
        return False
    if pattern == "@all":
        return True
    if pattern == "@linear":
        return kind in LINEAR_KINDS and role != "head"
    return role == pattern.removeprefix("@")
