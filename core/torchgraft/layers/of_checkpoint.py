"""List the layers of a checkpoint from its headers and config.json alone.

A matrix in a file does not say whether it is a Linear's (out, in), a Conv1D's (in, out) or an Embedding's; a square one
looks the same for all. So the kind is taken from names that have one meaning in every published architecture, from
model_type where they have two, and from the bias's length, which is the number of outputs. If doubt remains,
the layer gets no kind: the orientation is never guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torchgraft.checkpoint.header import TensorEntry
from torchgraft.checkpoint.packed import UNPACKED
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import FileFormatError, SelectionError, near
from torchgraft.layers.layer import BYPASSED, HEAD, Layer
from torchgraft.layers.roles import ATTENTION_LEAVES, EMBEDDING_LEAVES, HEADS, MLP_LEAVES
from torchgraft.layers.selection import name_matcher

if TYPE_CHECKING:
    from torchgraft.kinds.kind import Kind

CONV1D_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Models of transformers whose CONV1D_LEAVES are Conv1D. In LINEAR_MODELS they are Linear; in other models they can be either."""
LINEAR_MODELS = frozenset({"gpt_bigcode", "gpt_neo", "starcoder2"})

LINEAR_LEAVES = (
    ATTENTION_LEAVES | MLP_LEAVES | HEADS | frozenset("dense out_proj in_proj pos_proj pos_q_proj q k v o wo decoder".split())
) - CONV1D_LEAVES
CONV_LEAVES = frozenset(["conv", "conv1", "conv2", "patch_embedding", "projection"])

INPUT_EMBEDDINGS = frozenset("embed_tokens word_embeddings wte embed_in shared tokens_embed tok_embeddings embeddings w".split())
PLAIN_EMBEDDINGS = ("embed_tokens", "wte")
"""Names of input embeddings to which a tied head is called lm_head."""
HAS_HEAD = re.compile(r"(LM|LMHeadModel|PreTraining|ConditionalGeneration|MTModel)$")
"""Ends of the names of model classes whose output head can be the input embedding."""

SCALED = "bart mbart plbart m2m_100 nllb-moe bigbird_pegasus pegasus pegasus_x marian blenderbot blenderbot-small led mvp".split()
OWN_FORWARD = (
    ("whisper", "*decoder.embed_positions"),
    *((model, pattern) for model in SCALED for pattern in ("*shared", "*.embed_*")),
    ("opt", "*.embed_positions"),
    ("gemma*", "*embed_tokens"),
    *((model, "*embed_tokens") for model in ("biogpt", "xglm", "vaultgemma", "t5gemma*", "minicpm3")),
)
"""(model_type, layer): embeddings that scale or shift what they look up, so the output does not change by the weight's change itself."""

BYPASSED_LEAVES = {
    **dict.fromkeys(["mamba", "falcon_mamba"], ("out_proj", "dt_proj")),
    **dict.fromkeys(["mamba2", "falcon_h1", "nemotron_h", "zamba2", "granitemoehybrid", "bamba"], ("out_proj",)),
    "jamba": ("dt_proj",),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""model_type → names of the layers of which the model reads the weight and does not call the forward."""
BYPASSED_ANYWHERE = ("conv1d", "conv_1d")
"""The same, in the mixers of all models that have such a layer."""

MAX_DEPTH = 64
"""Largest depth of nested modules. Real models stay below 20; walking the tree costs time and memory per level."""

UNKNOWN = "has a weight whose orientation the names do not show; pass --kind '{name}=Linear' (or Conv1D, Embedding, Conv2d, …)"
UNQUANTIZED = "adapters can only be merged into the model that it was quantized from"
OF_EXPERTS = "belongs to a mixture of experts, whose weights the model may store in another form"


def layers_of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str] | None = None) -> list[Layer]:
    """Return every module that has tensors, in the order of the files. `kinds` (pattern → kind) overrides the kinds inferred from names.

    Raises:
        FileFormatError: a tensor's name has more segments than a model's can have.
        SelectionError: a pattern of `kinds` matches nothing, or a layer that cannot be of that kind.
    """
    owners: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for header in checkpoint.headers:
        for entry in header.in_file_order:
            if entry.name.count(".") > MAX_DEPTH:
                raise FileFormatError(f"{header.path}: the name {entry.name[:60]!r}… has more than {MAX_DEPTH} dots: is it a model?")
            module, _, leaf = entry.name.rpartition(".")
            if entry.name not in checkpoint.shadowed:
                owners[module][leaf] = entry
    model_type = str(checkpoint.config.get("model_type", ""))
    leaves = {leaf for name in _model_types(checkpoint.config) for leaf in BYPASSED_LEAVES.get(name, ())}
    layers = [_layer(name, tensors, model_type) for name, tensors in owners.items()]
    layers = [_unless_bypassed(layer, owners, (*leaves, *BYPASSED_ANYWHERE)) for layer in layers]
    return _overridden(_with_ties(layers, checkpoint), kinds or {})


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """Return the model_type of the model and of its parts, such as the language model of a multimodal one."""
    return {str(part.get("model_type")) for part in (config, *config.values()) if isinstance(part, Mapping)}


def _unless_bypassed(layer: Layer, owners: Mapping[str, Mapping[str, TensorEntry]], leaves: Container[str]) -> Layer:
    """Return the layer without a kind if the model reads its weight and does not call its forward."""
    parent, _, leaf = layer.name.rpartition(".")
    in_attention = leaf == "out_proj" and not owners.get(parent, {}).keys().isdisjoint(("in_proj_weight", "q_proj_weight"))
    if layer.has_weight and (in_attention or leaf in leaves):
        owner = "a MultiheadAttention" if in_attention else "the model"
        return replace(layer, kind=None, is_open=False, reason=BYPASSED.format(owner))
    return layer


def module_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of all modules that have tensors, directly or in children."""
    names: dict[str, None] = {}
    for module in dict.fromkeys(tensor.rpartition(".")[0] for tensor in checkpoint.tensors if "." in tensor):
        new = [module]
        while "." in new[-1] and new[-1] not in names:
            new.append(new[-1].rpartition(".")[0])
        names.update(dict.fromkeys(reversed(new)))  # containers first
    return list(names)


def _layer(name: str, tensors: Mapping[str, TensorEntry], model_type: str) -> Layer:
    weight = tensors.get("weight") or max(tensors.values(), key=lambda entry: entry.numel)
    verdict = Verdict()
    if "weight" in tensors and len(weight.shape) > 1:
        verdict = _kind(name, tensors, model_type)
    elif packed := next((entry for entry in tensors.values() if entry.dtype not in UNPACKED), None):
        verdict = Verdict(reason=f"is quantized: {packed.name.rpartition('.')[2]} has the type {packed.dtype}; {UNQUANTIZED}")
    elif "experts" in name.split(".") and len(weight.shape) > 2:  # transformers 5 stores all experts in one tensor
        verdict = Verdict(reason=OF_EXPERTS)
    params = size = 0
    for entry in tensors.values():
        params += prod(entry.shape)
        size += entry.end - entry.begin
    return Layer(
        name=name,
        kind=verdict.kind,
        shape=weight.shape,
        dtype=weight.dtype,
        params=params,
        bytes=size,
        has_bias="bias" in tensors,
        reason=verdict.reason,
        has_weight="weight" in tensors,
        is_open=verdict.is_open,
    )


class Verdict(NamedTuple):
    """What names and shapes show about a layer's kind."""

    kind: str | None = None
    reason: str = ""
    """Why it has no kind."""
    is_open: bool = False
    """Whether only its orientation is unknown, so that `--kind` can set the kind."""


def _kind(name: str, tensors: Mapping[str, TensorEntry], model_type: str) -> Verdict:
    """Determine the kind of a layer with a matrix, or why it has none."""
    unknown = Verdict(reason=UNKNOWN.format(name=name), is_open=True)
    shape, dtype = tensors["weight"].shape, tensors["weight"].dtype
    segments = name.split(".")
    leaf = segments[-1]
    if dtype not in ADAPTABLE:
        return Verdict(reason=f"is quantized: weight has the type {dtype}; {UNQUANTIZED}")
    if 0 in shape:
        return Verdict(reason=f"has an empty weight of shape {list(shape)}")
    if any(fnmatchcase(name, pattern) for pattern in _own_forwards(model_type)):
        return Verdict(reason="is an embedding with its own forward, which scales or shifts what it looks up")
    if "experts" in segments or leaf in ("gate", "router"):
        return Verdict(reason=OF_EXPERTS, is_open="experts" in segments and len(shape) == 2)  # an expert of its own
    if leaf not in CONV1D_LEAVES and _outputs(tensors) not in (None, shape[0]):
        return unknown  # the bias contradicts what the name says
    if len(shape) > 2:
        is_conv = leaf in CONV_LEAVES or (leaf == "proj" and any("patch_embed" in segment for segment in segments))
        return Verdict(f"Conv{len(shape) - 2}d") if is_conv and len(shape) <= 5 else unknown
    if leaf in CONV1D_LEAVES:
        kind = _transposed(tensors, model_type)
        return Verdict(kind) if kind else unknown
    if leaf in EMBEDDING_LEAVES:
        return Verdict("Embedding")
    if leaf in LINEAR_LEAVES or not HEADS.isdisjoint(segments) or _outputs(tensors) == shape[0] != shape[1]:
        return Verdict("Linear")
    return unknown


@cache
def _own_forwards(model_type: str) -> tuple[str, ...]:
    """Return the patterns of OWN_FORWARD for this model type."""
    return tuple(layer for model, layer in OWN_FORWARD if fnmatchcase(model_type, model))


def _transposed(tensors: Mapping[str, TensorEntry], model_type: str) -> str | None:
    """Return Conv1D or Linear for a name that can be either, or None if it cannot be decided."""
    if model_type in CONV1D_MODELS:
        return "Conv1D"
    if model_type in LINEAR_MODELS:
        return "Linear"
    outputs, (first, second) = _outputs(tensors), tensors["weight"].shape
    if outputs is None or first == second:
        return None
    return {first: "Linear", second: "Conv1D"}.get(outputs)


def _outputs(tensors: Mapping[str, TensorEntry]) -> int | None:
    bias = tensors.get("bias")
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def _with_ties(layers: list[Layer], checkpoint: Checkpoint) -> list[Layer]:
    """Mark the input embedding as tied if it is also the output head's weight; the files may then lack the head."""
    declared = checkpoint.config.get("tie_word_embeddings")
    architectures = checkpoint.config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    if declared is False or not any(HAS_HEAD.search(str(name)) for name in architectures):
        return layers
    heads = {layer.shape for layer in layers if layer.role == "head"}
    is_plain = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    found = []
    for layer in layers:
        if not is_input_embedding(layer) or not (declared or layer.shape not in heads):
            found.append(layer)
        elif is_plain and layer.kind == "Embedding" and layer.name.rpartition(".")[2] in PLAIN_EMBEDDINGS:
            found.append(replace(layer, tied=(HEAD,)))
        else:
            found.append(replace(layer, tied=("the output head",)))
    return _with_head(found)


def _with_head(layers: list[Layer]) -> list[Layer]:
    """Tie the head to its embedding, and add the head if the files lack it."""
    embedding = next((layer for layer in layers if layer.tied == (HEAD,)), None)
    if embedding is None:
        return layers
    if any(layer.name == HEAD for layer in layers):
        return [replace(layer, tied=(embedding.name,)) if layer.name == HEAD else layer for layer in layers]
    shape, dtype = embedding.shape, embedding.dtype
    return [*layers, Layer(HEAD, "Linear", shape, dtype, 0, 0, tied=(embedding.name,), weight_of=embedding.name)]


def is_input_embedding(layer: Layer) -> bool:
    """Whether the layer's name is one that models give to their input embedding."""
    return len(layer.shape) == 2 and layer.name.rpartition(".")[2] in INPUT_EMBEDDINGS


def _overridden(layers: list[Layer], kinds: Mapping[str, str]) -> list[Layer]:
    if not kinds:
        return layers
    from torchgraft.plugin.registry import registry  # imported here because it loads pydantic, which is slow

    for pattern, name in kinds.items():
        kind, matches = registry().kind(name), name_matcher(pattern)
        chosen = {layer.name for layer in layers if matches(layer.name) and len(layer.shape) > 1}
        if not chosen:
            raise SelectionError(
                f"kind {name}: {pattern!r} matches no layer that has a matrix{near(pattern, (layer.name for layer in layers))}"
            )
        layers = [_with_kind(layer, kind) if layer.name in chosen else layer for layer in layers]
    return layers


def _with_kind(layer: Layer, kind: Kind) -> Layer:
    if layer.dtype not in ADAPTABLE or not layer.has_weight or 0 in layer.shape:
        raise SelectionError(f"{layer.name}: it cannot be a {kind.name}: it {layer.reason or 'has no tensor called weight'}")
    if not kind.fits(layer.shape):
        raise SelectionError(f"{layer.name}: it cannot be a {kind.name}: its weight has the shape {list(layer.shape)}")
    return replace(layer, kind=kind.name, reason="")
