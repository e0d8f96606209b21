"""Every use of an adapter notices that a layer was replaced after it was attached."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import torchgraft as tg
from models import build, perturb_

X = torch.arange(8).reshape(2, 4)


def assigned(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(*reversed(model.model.layers[0].self_attn.q_proj.weight.shape), bias=False)


def cut_off(model: Any) -> None:
    model.model.layers = model.model.layers[1:]


def deleted(model: Any) -> None:
    del model.model.layers[0].self_attn.q_proj


def block_replaced(model: Any) -> None:
    model.model.layers[0] = build("llama").model.layers[0]


CHANGES = {"assigned": assigned, "cut off": cut_off, "block replaced": block_replaced}
USES: dict[str, Callable[[tg.Adapter, Path], Any]] = {
    "forward": lambda adapter, path: adapter.model(X),
    "save": lambda adapter, path: adapter.save(path),
    "merge": lambda adapter, path: adapter.merge(),
    "count": lambda adapter, path: adapter.count(),
    "param_groups": lambda adapter, path: adapter.param_groups(1e-3),
    "optimizer": lambda adapter, path: adapter.optimizer("adamw", 1e-3),
    "step": lambda adapter, path: adapter.step(torch.optim.SGD(adapter.parameters(), 0.1), step=1),
    "active": lambda adapter, path: setattr(adapter, "active", False),
    "disabled": lambda adapter, path: adapter.disabled().__enter__(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_use_after_a_layer_was_replaced_is_refused(change: str, use: str, tmp_path: Path) -> None:
    model = build("llama")
    adapter = tg.apply(model, "lora", ["*.{q,v}_proj"])
    CHANGES[change](model)
    with pytest.raises(tg.AttachError, match=r"q_proj.*: the layer was replaced after the adapter 'default' was attached"):
        USES[use](adapter, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_resized_embeddings_are_noticed_by_forward() -> None:
    model = build("llama")
    tg.apply(model, "lora", ["lm_head"])
    model.resize_token_embeddings(model.config.vocab_size + 6)
    with pytest.raises(tg.AttachError, match=r"^lm_head: the layer was replaced .*resize_token_embeddings"):
        model(X)


def test_a_replaced_module_that_is_trained_whole_is_noticed() -> None:
    model = build("llama")
    tg.apply(model, "lora", ["q_proj"], also_train=["lm_head"])
    model.lm_head = copy.deepcopy(model.get_submodule("lm_head"))  # with its adapters
    model(X)
    model.lm_head = nn.Linear(model.config.hidden_size, 5)
    with pytest.raises(tg.AttachError, match=r"^lm_head: the layer was replaced"):
        model(X)


@pytest.mark.parametrize("change", [*CHANGES, "deleted"])
def test_the_adapter_is_detached_from_the_layers_that_are_left(change: str) -> None:
    model = build("llama")
    adapter = tg.apply(model, "lora", ["*.{q,v}_proj"])
    (deleted if change == "deleted" else CHANGES[change])(model)
    with pytest.warns(tg.TorchgraftWarning, match=r"detached from the layers that are left; .*q_proj"):
        adapter.detach()
    assert tg.adapters(model) == {}
    assert not [name for name, _ in model.named_parameters() if "adapters" in name]
    assert not model._forward_pre_hooks
    if change != "deleted":
        model(X)


def test_an_adapter_that_is_not_active_does_not_stop_forward() -> None:
    model = build("llama")
    adapter = tg.apply(model, "lora", ["q_proj"])
    adapter.active = False
    assigned(model)
    model(X)
    with pytest.raises(tg.AttachError, match="was replaced"):
        adapter.active = True


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_notice_it_on_their_own(copied: Callable[[Any], Any]) -> None:
    model = build("llama")
    adapter = tg.apply(model, "lora", ["q_proj"])
    perturb_(adapter.parameters())
    other = copied(model)
    assert torch.equal(other(X).logits, model(X).logits)
    assigned(other)
    with pytest.raises(tg.AttachError, match="was replaced"):
        other(X)
    model(X)
    adapter.detach()
    assert not model._forward_pre_hooks


def test_activation_checkpointing_wrappers_are_no_replacement() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = hf.LlamaForCausalLM(build("llama").config)
    tg.apply(model, "lora", ["q_proj"])
    expected = model(X).logits
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert torch.equal(model(X).logits, expected)
