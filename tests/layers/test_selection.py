"""The selection grammar on real architectures, and its properties against small references written here."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

import models
import torchgraft as tg
from torchgraft.layers.layer import Layer
from torchgraft.layers.selection import MAX_BRACES, expand_braces, select


def _shared() -> nn.Module:
    """One layer under two names, and one block that stands in a list twice."""
    layer, block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    return nn.ModuleDict({"first": layer, "stack": nn.ModuleList([block, block]), "again": layer})


def _experts() -> nn.Module:
    experts = [nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2)]
    blocks = [nn.ModuleDict({"experts": two, "attn": nn.ModuleDict({"mlp": nn.Linear(4, 6)})}) for two in experts]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def _stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(24)))


SMALL = {"plain": models.Plain, "shared": _shared, "stack": _stack, "experts": _experts}

ATTN, MLP = "model.layers.{0,1}.self_attn.{q,k,v,o}_proj", "model.layers.{0,1}.mlp.{gate,up,down}_proj"
LLAMA = f"{ATTN} | {MLP} | | model.embed_tokens | | lm_head"
BERT = "X.encoder.layer.{0,1}.attention.{self.query,self.key,self.value,output.dense} | X.encoder.layer.{0,1}.{intermediate,output}.dense"
BERT_EMBED = "bert.embeddings.{word,position,token_type}_embeddings"
DEBERTA = (
    "deberta.encoder.layer.{0,1}.attention.{self.@,output.dense} | deberta.encoder.layer.{0,1}.{intermediate,output}.dense | pooler.dense"
    " | deberta.embeddings.{word,position}_embeddings deberta.encoder.rel_embeddings | deberta.encoder.conv.conv | classifier"
)
CROSS = "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}"
WHISPER_CROSS = "model.decoder.layers.{0,1}.encoder_attn.{q,k,v,out}_proj"
ROLES = {
    # @attention | @mlp | further matrices, in @linear and @all alone | @embedding | @conv | @head
    **dict.fromkeys(["llama", "qwen2", "mistral"], LLAMA),
    "gpt2": "transformer.h.{0,1}.attn.c_{attn,proj} | transformer.h.{0,1}.mlp.c_{fc,proj} | | transformer.w{t,p}e | | lm_head",
    "gpt_neox": "gpt_neox.layers.{0,1}.attention.{query_key_value,dense} | gpt_neox.layers.{0,1}.mlp.dense_{h_to_4h,4h_to_h}"
    " | | gpt_neox.embed_in | | lm_head",
    "bert": f"{BERT.replace('X', 'bert')} | bert.pooler.dense | {BERT_EMBED} | | classifier",
    "bert_lm": f"{BERT.replace('X', 'bert')} | | {BERT_EMBED} | | cls.predictions.{{transform.dense,decoder}}",
    "roberta": f"{BERT.replace('X', 'roberta')} | | {BERT_EMBED.replace('bert', 'roberta')} | | classifier.{{dense,out_proj}}",
    "deberta": DEBERTA.replace("self.@", "self.in_proj,self.pos_proj,self.pos_q_proj").replace("deberta.encoder.conv.conv", ""),
    "deberta_v2": DEBERTA.replace("self.@", ",".join(f"self.{x}_proj" for x in ("query", "key", "value", "pos_key", "pos_query"))),
    "t5": f"{{en,de}}coder.block.{{0,1}}.layer.0.SelfAttention.{{q,k,v,o}} {CROSS}"
    " | {encoder.block.0.layer.1,encoder.block.1.layer.1,decoder.block.0.layer.2,decoder.block.1.layer.2}.DenseReluDense.{wi_0,wi_1,wo} |"
    " | shared {en,de}coder.embed_tokens {en,de}coder.block.0.layer.0.SelfAttention.relative_attention_bias | | lm_head",
    "vit": "vit.layers.{0,1}.attention.{q,k,v,o}_proj | vit.layers.{0,1}.mlp.fc{1,2} | | | vit.embeddings.patch_embeddings.projection"
    " | classifier",
    "whisper": f"model.{{en,de}}coder.layers.{{0,1}}.self_attn.{{q,k,v,out}}_proj {WHISPER_CROSS}"
    " | model.{en,de}coder.layers.{0,1}.fc{1,2} | | model.encoder.embed_positions model.decoder.embed_tokens"
    " | model.encoder.conv{1,2} | proj_out",
    "plain": "attn.{q,out}_proj | mlp.{0,2} | | embed | conv | head",
}
PARTS = {"attention": [0], "mlp": [1], "linear": [0, 1, 2], "embedding": [3], "conv": [4], "head": [5], "all": range(6)}

CASES: list[tuple[str, str, Any, str, list[int]]] = [
    # model (on disk with a slash), targets, layers, the matched names, the count of each target
    ("llama", "*.{q,v}_proj", None, "model.layers.{0,1}.self_attn.{q,v}_proj", [4]),
    ("llama", "q_proj", None, "model.layers.{0,1}.self_attn.q_proj", [2]),
    ("llama", "model.layers.1.mlp.up_proj", None, "model.layers.1.mlp.up_proj", [1]),
    ("llama", "*proj", None, f"{ATTN} {MLP}", [14]),
    ("llama", "*.?_proj", None, ATTN, [8]),
    ("llama", "*.[!qk]_proj", None, "model.layers.{0,1}.self_attn.{v,o}_proj", [4]),
    ("llama", "*.[a-o]_proj", None, "model.layers.{0,1}.self_attn.{k,o}_proj", [4]),
    ("llama", "model.layers.[1-9].mlp.*", None, "model.layers.1.mlp.{gate,up,down}_proj", [3]),
    ("llama", "model?layers?0?mlp?up_proj", None, "model.layers.0.mlp.up_proj", [1]),
    ("llama", "*.{self_attn.{q,k{,x}},mlp.{up,down}}_proj", None, "model.layers.{0,1}.{self_attn.q,self_attn.k,mlp.up,mlp.down}_proj", [8]),
    ("llama", "{q,o}_proj", None, "model.layers.{0,1}.self_attn.{q,o}_proj", [4]),
    ("llama", r"re:.*\.0\.self_attn\.[qk]_proj", None, "model.layers.0.self_attn.{q,k}_proj", [2]),
    ("llama", r"re:model\.layers\.\d+\.mlp\.(up|gate)_proj", None, "model.layers.{0,1}.mlp.{up,gate}_proj", [4]),
    ("llama", "re:lm_head|.*(q|v)_proj", None, "lm_head model.layers.{0,1}.self_attn.{q,v}_proj", [5]),
    ("llama", "re:(?i)LM_HEAD", None, "lm_head", [1]),
    ("llama", "@linear !*.mlp.*", None, ATTN, [14, 6]),
    ("llama", "@all !@head !embed_tokens !@attention", None, MLP, [16, 1, 1, 8]),
    ("llama", "q_proj *.q_proj @attention", None, ATTN, [2, 2, 8]),
    ("llama", r"@attention !re:.*\.1\..*", None, "model.layers.0.self_attn.{q,k,v,o}_proj", [8, 7]),
    ("llama", "@linear", "0", "model.layers.0.self_attn.{q,k,v,o}_proj model.layers.0.mlp.{gate,up,down}_proj", [7]),
    ("llama", "@attention !q_proj", " 0 , 1 ", "model.layers.{0,1}.self_attn.{k,v,o}_proj", [8, 2]),
    ("llama/", "*.{q,v}_proj !*.1.*", None, "model.layers.0.self_attn.{q,v}_proj", [4, 7]),
    ("mistral", "*.layers.*.mlp.{up,down}_proj !*.0.*", None, "model.layers.1.mlp.{up,down}_proj", [4, 7]),
    ("gpt2", "c_proj", None, "transformer.h.{0,1}.{attn,mlp}.c_proj", [4]),
    ("gpt2", "*.c_* !*attn*", None, "transformer.h.{0,1}.mlp.c_{fc,proj}", [8, 4]),
    ("gpt2", r"re:.*\.h\.1\..*", None, "transformer.h.1.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}", [4]),
    ("gpt2/", "@attention", range(2), "transformer.h.{0,1}.attn.c_{attn,proj}", [4]),
    ("gpt_neox", "dense", None, "gpt_neox.layers.{0,1}.attention.dense", [2]),
    ("gpt_neox/", "@head embed_in", None, "embed_out gpt_neox.embed_in", [1, 1]),
    ("bert", "dense", None, "bert.encoder.layer.{0,1}.{attention.output,intermediate,output}.dense bert.pooler.dense", [7]),
    ("bert", "output.dense", None, "bert.encoder.layer.{0,1}.{attention.output,output}.dense", [4]),
    ("bert", "*.layer.?.output.dense", None, "bert.encoder.layer.{0,1}.output.dense", [2]),
    ("bert", "query key value !*.1.*", None, "bert.encoder.layer.0.attention.self.{query,key,value}", [2, 2, 2, 6]),
    ("bert", "*embeddings*", None, BERT_EMBED, [3]),
    ("bert_lm", "predictions.{decoder,transform.dense}", None, "cls.predictions.{decoder,transform.dense}", [2]),
    ("roberta", "dense !classifier.*", None, "roberta.encoder.layer.{0,1}.{attention.output,intermediate,output}.dense", [7, 2]),
    ("deberta", "*.{in,pos}_proj", None, "deberta.encoder.layer.{0,1}.attention.self.{in,pos}_proj", [4]),
    ("deberta_v2", "*query_proj", None, "deberta.encoder.layer.{0,1}.attention.self.{query,pos_query}_proj", [4]),
    ("deberta_v2", r"re:.*\.(query|value)_proj", None, "deberta.encoder.layer.{0,1}.attention.self.{query,value}_proj", [4]),
    ("t5", "q", None, "{en,de}coder.block.{0,1}.layer.0.SelfAttention.q decoder.block.{0,1}.layer.1.EncDecAttention.q", [6]),
    ("t5", "*.SelfAttention.? !decoder.*", "1", "encoder.block.1.layer.0.SelfAttention.{q,k,v,o}", [8, 11]),
    ("t5", "wo", [0], "encoder.block.0.layer.1.DenseReluDense.wo decoder.block.0.layer.2.DenseReluDense.wo", [2]),
    ("t5", "*.wi_[01] wo", "1", "{encoder.block.1.layer.1,decoder.block.1.layer.2}.DenseReluDense.{wi_0,wi_1,wo}", [4, 2]),
    ("t5", "embed_tokens", None, "{en,de}coder.embed_tokens", [2]),
    ("t5", "@embedding !relative_attention_bias", None, "shared {en,de}coder.embed_tokens", [5, 2]),
    ("t5", r"re:decoder\..*\.(Self|EncDec)Attention\.[qv]", "0", "decoder.block.0.layer.{0.Self,1.EncDec}Attention.{q,v}", [4]),
    ("vit", "vit.layers.0.*", None, "vit.layers.0.attention.{q,k,v,o}_proj vit.layers.0.mlp.fc{1,2}", [6]),
    ("vit/", "query output.dense", "1", "vit.encoder.layer.1.{attention.attention.query,attention.output.dense,output.dense}", [1, 2]),
    ("whisper", "out_proj", None, f"model.{{en,de}}coder.layers.{{0,1}}.self_attn.out_proj {WHISPER_CROSS.replace('q,k,v,', '')}", [6]),
    ("whisper", "model.encoder.* !*.{conv,fc}? !@embedding", None, "model.encoder.layers.{0,1}.self_attn.{q,k,v,out}_proj", [15, 10, 2]),
    ("whisper", "@attention !encoder_attn.{q,k,v,out}_proj", "0", "model.{en,de}coder.layers.0.self_attn.{q,k,v,out}_proj", [12, 4]),
    ("plain", "[ce]* h??d", None, "conv embed head", [2, 1]),
    ("shared", "again", None, "first", [1]),
    ("shared", "* !again", None, "stack.0.{0,2}", [3, 1]),
    ("shared", "@linear", "1", "stack.0.{0,2}", [2]),
    ("stack", "*", "0-15,20", "{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,20}", [17]),
    ("stack", "1? !1[2-9]", None, "{10,11}", [10, 8]),
    ("experts", "1", None, "layers.{0,1}.experts.1", [2]),
    ("experts", "@mlp", "1", "layers.1.{experts.0,experts.1,attn.mlp}", [3]),
]

MISTAKES: list[tuple[str, str, list[Any], str]] = [
    # model, lists of targets, choices of layers, what the message says of each
    ("llama", "q_porj; *.q_porj; re:.*q_porj; k_proj q_porj; @linear !q_porj", [None], "q_porj' matches no layer; near names: q_proj"),
    ("llama", "model.layer.0.self_attn.q_proj", [None, "0"], "near names: model.layers.0.self_attn.q_proj"),
    ("llama", "proj; ?_proj; Q_proj; re:q_proj; self_attn.q_pro; layers.0.*; !!lm_head; {}; lm_head.weight", [None], "matches no layer"),
    ("t5/", "embed_tokens; lm_head; @head; @conv", [None], "matches no layer"),
    ("vit/", "q_proj; @embedding; vit.layers.*", [None], "matches no layer"),
    ("llama", "@atention; @; @linear !@heads", [None], "is not a role; the roles are @attention @mlp @linear @embedding @conv @head @all"),
    ("llama", "re:[; re:*.q_proj; re:(q_proj; !re:(; re:q{99999999999999999999}", [None], "is not a regular expression"),
    ("llama", "*.[z-a]_proj", [None], "'*.[z-a]_proj'"),
    ("llama", "{q,v_proj; q,v}_proj; {q,{v}_proj; q}_proj{; q}_{proj}; !{", [None], "do not pair"),
    ("llama", "!lm_head; !@all !q_proj", [None], "only excludes"),
    ("llama", "@linear !@linear; q_proj v_proj !*.self_attn.*; @all lm_head !*", [None], "nothing is left"),
    ("llama", "@linear", ["2", "0-5", "0-999999999", "1,2", [0, 2], range(4)], "no block 2; its blocks are 0 to 1"),
    ("llama", "@linear", ["1-0", "0,x", "", "0,", "-1", "1.0"], "is not a block or a range; write it like 0-15,20"),
    ("llama", "@linear", [[]], "matches no layer in blocks"),
    ("llama", "lm_head; q_proj lm_head; @mlp !lm_head; q_proj @embedding", ["1", [0]], "matches no layer in blocks"),
    ("llama", "*norm*; input_layernorm; re:.*norm", [None, "0"], "model.layers.0.input_layernorm is a norm layer"),
    ("bert", "LayerNorm; @linear !*.LayerNorm", [None], "that can be adapted: bert.embeddings.LayerNorm is a norm layer"),
    ("whisper", "decoder.embed_positions", [None], "that can be adapted: model.decoder.embed_positions is a WhisperPositionalEmbedding"),
    ("vit", "vit.embeddings", [None], "that can be adapted: vit.embeddings"),
]
EACH_MISTAKE = [(row[0], one.split(), blocks, row[3]) for row in MISTAKES for one in row[1].split(";") for blocks in row[2]]
MALFORMED = {"": "'' is empty", "!": "'!' is empty", "@nope": "not a role", "re:[": "not a regular expression", "{a": "do not pair"}


def words(text: str) -> list[str]:
    """The words of `text`, with the options of each (never nested) brace written out."""
    parts = ([part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", word))] for word in text.split())
    return ["".join(choice) for word in parts for choice in itertools.product(*word)]


@cache
def module(name: str) -> nn.Module:
    return SMALL[name]() if name in SMALL else models.build(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module | Path, list[str]]]:
    """A model, or with a slash its checkpoint, and the names of its layers in order."""

    @cache
    def get(name: str) -> tuple[nn.Module | Path, list[str]]:
        model = module(name.removesuffix("/"))
        if not name.endswith("/"):
            return model, [name for name, _ in model.named_modules(remove_duplicate=False)]
        root = tmp_path_factory.mktemp(name[:-1])
        model.save_pretrained(root)
        return root, names_in_file(root / "model.safetensors")

    return get


def names_in_file(path: Path) -> list[str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]
    tensors = sorted(header, key=lambda name: header[name]["data_offsets"])
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))


def check(plan: tg.Plan, order: list[str], expected: list[str], counts: dict[str, int]) -> None:
    assert {site.name for site in plan.sites} == set(expected)
    assert [site.name for site in plan.sites] == [name for name in order if name in expected]
    assert plan.patterns == counts


@pytest.mark.parametrize(("name", "targets", "layers", "expected", "counts"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_targets_name_these_layers(source, name, targets, layers, expected, counts):
    model, order = source(name)
    check(tg.plan(model, targets.split(), layers), order, words(expected), dict(zip(targets.split(), counts, strict=True)))


@pytest.mark.parametrize("role", PARTS)
@pytest.mark.parametrize("name", ROLES)
def test_roles_name_these_layers(source, name, role):
    expected = [word for part in PARTS[role] for word in words(ROLES[name].split("|")[part])]
    model, order = source(name)
    if expected:
        check(tg.plan(model, f"@{role}"), order, expected, {f"@{role}": len(expected)})
    else:
        with pytest.raises(tg.SelectionError, match=f"'@{role}' matches no layer; the roles here are @attention, "):
            tg.plan(model, f"@{role}")


@pytest.mark.parametrize(
    ("name", "targets", "layers", "says"), EACH_MISTAKE, ids=[f"{row[0]} {' '.join(row[1])} {row[2]}" for row in EACH_MISTAKE]
)
def test_a_mistake_is_refused_with_its_reason(source, name, targets, layers, says):
    with pytest.raises(tg.SelectionError, match=re.escape(says)):
        tg.plan(source(name)[0], targets, layers)


CONTAINERS = [  # model, pattern, what is in the modules that it names
    ("llama", "model.layers.0", "model.layers.0.{self_attn.q,self_attn.k,self_attn.v,self_attn.o,mlp.gate,mlp.up,mlp.down}_proj"),
    ("llama", "self_attn", ATTN),
    ("llama", "*.mlp", MLP),
    ("bert", "attention.self", "bert.encoder.layer.{0,1}.attention.self.{query,key,value}"),
    ("plain", "mlp", "mlp.{0,2}"),
]


@pytest.mark.parametrize(("name", "container", "inside"), CONTAINERS)
def test_a_container_is_refused_with_a_pattern_that_takes_what_is_in_it(name, container, inside):
    with pytest.raises(tg.SelectionError, match="container") as caught:
        tg.plan(module(name), container)
    advice = re.findall(r"write '([^']+)'", str(caught.value))
    assert {site.name for site in tg.plan(module(name), advice).sites} == set(words(inside))


def test_without_targets_every_matrix_but_the_head_is_taken():
    assert tg.plan(module("bert")) == tg.plan(module("bert"), ["@linear"])


def test_allow_unmatched_takes_what_there_is():
    model = module("llama")
    plan = tg.plan(model, ["q_proj", "nope", "!neither"], layers="1,9", allow_unmatched=True)
    assert [site.name for site in plan.sites] == ["model.layers.1.self_attn.q_proj"]
    assert plan.patterns == {"q_proj": 1, "nope": 0, "!neither": 0}
    assert tg.plan(model, ["q_proj", "!*"], allow_unmatched=True).sites == ()


@pytest.mark.parametrize("allow_unmatched", [False, True])
@pytest.mark.parametrize("target", MALFORMED)
def test_a_malformed_pattern_is_never_forgiven(target, allow_unmatched):
    with pytest.raises(tg.SelectionError, match=re.escape(MALFORMED[target])):
        tg.plan(module("llama"), ["q_proj", target], allow_unmatched=allow_unmatched)


BOMBS = {
    "product": "{a,b}" * 40,
    "one long brace": "{" + "a," * MAX_BRACES + "a}",
    "nested": "{{a,b}{a,b},c}" * 8,
    "many braces": "{a}" * 3000,
    "deep braces": "{" * 3000 + "a" + "}" * 3000,
    "deep groups": "re:" + "(" * 5000 + "a" + ")" * 5000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_an_expansion_bomb_is_refused(bomb):
    with pytest.raises(tg.SelectionError):
        tg.plan(module("plain"), bomb)


# A glob is drawn as tokens: a text, and which characters it accepts. None accepts any run of them.
Token = tuple[str, Callable[[str], bool] | None]
LETTERS = "ab.01_^-&]\\$(+"
NAMES = st.text(LETTERS, max_size=8)
LITERALS = st.sampled_from(LETTERS).map(lambda text: (text, lambda c: c == text))
MEMBERS = st.lists(st.sampled_from([*"ab._^&~|\\", "a-c", "0-1"]), min_size=1, max_size=4)


def _class(negated: bool, members: list[str]) -> Token:
    accepted = {chr(code) for span in members for code in range(ord(span[0]), ord(span[-1]) + 1)}
    return f"[{'!' * negated}{''.join(members)}]", lambda c: (c in accepted) != negated


WILD: st.SearchStrategy[Token] = st.just(("*", None)) | st.just(("?", lambda c: True)) | st.builds(_class, st.booleans(), MEMBERS)
GLOBS = st.tuples(st.lists(LITERALS | WILD, max_size=3), WILD, st.lists(LITERALS | WILD, max_size=3)).map(lambda t: [*t[0], t[1], *t[2]])


def reference(tokens: list[Token], name: str) -> bool:
    """Whether the glob takes the name; without a wildcard it is a suffix on whole segments."""
    text = text_of(tokens)
    if not any(mark in text for mark in "*?["):
        return name == text or name.endswith(f".{text}")
    return _takes(tokens, name)


def _takes(tokens: list[Token], name: str) -> bool:
    if not tokens:
        return not name
    (_, accepts), rest = tokens[0], tokens[1:]
    if accepts is None:
        return any(_takes(rest, name[start:]) for start in range(len(name) + 1))
    return bool(name) and accepts(name[0]) and _takes(rest, name[1:])


def text_of(tokens: list[Token]) -> str:
    return "".join(text for text, _ in tokens)


def layers_called(names: Iterable[str]) -> list[Layer]:
    return [Layer(name, "Linear", (2, 2), "float32", 4, 16) for name in names]


@st.composite
def a_name_that_fits(draw: st.DrawFn, tokens: list[Token]) -> str:
    choices = [NAMES if accepts is None else st.sampled_from([c for c in LETTERS if accepts(c)] or "x") for _, accepts in tokens]
    return "".join(draw(choice) for choice in choices)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), tokens=GLOBS | st.lists(LITERALS, min_size=1, max_size=4))
def test_a_pattern_takes_what_a_small_matcher_takes(data, tokens):
    fitting = [data.draw(a_name_that_fits(tokens)) for _ in range(2)]
    names = list(dict.fromkeys([*fitting, f"ab.{fitting[0]}", f"b{fitting[0]}", *data.draw(st.lists(NAMES, max_size=4))]))
    selection = select(layers_called(names), [text_of(tokens)], allow_unmatched=True)
    expected = [name for name in names if reference(tokens, name)]
    assert [layer.name for layer in selection.layers] == expected
    assert selection.counts == {text_of(tokens): len(expected)}


# A pattern with braces is drawn as a list of texts and of tuples of options, which are such lists.
PLAIN_TEXT = st.text("ab.*", max_size=3)
BRACED = st.recursive(
    PLAIN_TEXT.map(lambda text: [text]),
    lambda inner: st.lists(PLAIN_TEXT | st.lists(inner, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    max_leaves=12,
)


def written(parts: list[Any]) -> str:
    return "".join(part if isinstance(part, str) else "{" + ",".join(map(written, part)) + "}" for part in parts)


def expanded(parts: list[Any]) -> list[str]:
    if not parts:
        return [""]
    first = [parts[0]] if isinstance(parts[0], str) else [text for option in parts[0] for text in expanded(option)]
    return [start + end for start in first for end in expanded(parts[1:])]


@settings(deadline=None)
@given(BRACED)
def test_braces_expand_as_a_recursive_reference_does(parts):
    assert expand_braces(written(parts)) == expanded(parts)


@settings(deadline=None)
@given(data=st.data(), parts=BRACED.filter(lambda parts: "{" in written(parts)))
def test_a_lost_brace_is_an_error(data, parts):
    text = written(parts)
    lost = data.draw(st.sampled_from([index for index, character in enumerate(text) if character in "{}"]))
    with pytest.raises(tg.SelectionError, match="do not pair"):
        expand_braces(text[:lost] + text[lost + 1 :])


SEGMENTS = st.sampled_from(["a", "b", "q", "0", "1", "2", "a1"])
MODELS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
SIGNED = st.tuples(st.booleans(), GLOBS | SEGMENTS.map(lambda word: [(c, lambda x, c=c: x == c) for c in word]))


@settings(deadline=None, max_examples=300)
@given(names=MODELS, signed=st.lists(SIGNED, min_size=1, max_size=4), blocks=st.none() | st.sets(st.integers(0, 2)))
def test_a_list_is_a_union_without_what_is_excluded_in_the_models_order(names, signed, blocks):
    numbers = {name: next((int(part) for part in name.split(".") if part in "012"), None) for name in names}
    kept = [name for name in names if blocks is None or numbers[name] in blocks]
    hits = {"!" * out + text_of(tokens): {name for name in kept if reference(tokens, name)} for out, tokens in signed}
    taken = set().union(*(found for text, found in hits.items() if text[0] != "!"))
    left_out = set().union(*(found for text, found in hits.items() if text[0] == "!"))
    expected = [name for name in names if name in taken - left_out]
    selection = select(layers_called(names), hits, blocks, allow_unmatched=True)
    assert [layer.name for layer in selection.layers] == expected
    assert selection.counts == {text: len(found) for text, found in hits.items()}
    if all(hits.values()) and expected and (blocks or set()) <= set(numbers.values()):
        assert select(layers_called(names), hits, blocks).layers == selection.layers
    else:
        with pytest.raises(tg.SelectionError):
            select(layers_called(names), hits, blocks)
