"""Checks of merging on a model: the output of a merged layer, and that unmerging restores every bit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from torchgraft.on_files.merge import merge_checkpoint
from torchgraft.on_files.unmerge import unmerge_checkpoint
from torchgraft.testing.arithmetic import check_inverse
from torchgraft.testing.cases import LAYER, Case, backward, part_of
from torchgraft.testing.checks import FLOATS, check
from torchgraft.testing.compare import close, require, same_bits, snapshot, unchanged

MERGE = "compare adapter_merge with adapter_forward"


@check(*FLOATS, bias=False, core=True)
def merge(case: Case) -> None:
    """A merged layer without a bias gives the same output as forward, with perturbed parameters."""
    _merged_output(case, f"{MERGE}: the same scale, the same transposition?")


@check(*FLOATS, bias=True, core=True)
def bias(case: Case) -> None:
    """A merged layer with a bias gives the same output as forward, with perturbed parameters."""
    _merged_output(case, f"{MERGE}: does forward treat the bias in base(x) as the merged layer will? adapter_merge_bias changes it")


def _merged_output(case: Case, hint: str) -> None:
    model, adapter = case.adapted()
    expected, base = model(case.x).detach(), case.base()(case.x).detach()
    require(
        not expected.equal(base),
        "the output does not change when every trained parameter does, so forward uses none of them; look at adapter_forward",
    )
    adapter.merge()
    close(model(case.x), expected, case.eps, "the merged layer's output, against the forward before", hint)
    with torch.no_grad():
        close(model.train()(case.x), expected, case.eps, "the merged layer's output in training", hint)


@check(torch.float64, *FLOATS, core=True)
def unmerge(case: Case) -> None:
    """`adapter.unmerge()` restores base and adapter to the last bit, also the second time.

    adapter_unmerge alone inverts adapter_merge approximately in float64, unless the method is additive: then it is never called.
    """
    model, adapter = case.adapted()
    if not case.hooks.method.additive:
        check_inverse(adapter)
    before, expected = snapshot(model), model(case.x)
    hint = "look for tensors that adapter_merge or adapter_unmerge changes in place"
    for times in ("once", "twice"):
        adapter.merge()
        adapter.unmerge()
        unchanged(model, before, f"merged and unmerged {times}", hint)
    same_bits(model(case.x), expected, "the output after merging and unmerging", hint)
    adapter.detach()
    require(type(model.layer) is type(case.base().layer), f"after detach() the layer is a {type(model.layer).__name__}")


@check(layers="quantized")
def quantized(case: Case) -> None:
    """A quantized layer trains, merges into a dense layer with the same output, and gets its codes back, also after a forward in eval."""
    model = case.base()
    model(case.x)  # in eval, which may repack codes
    before, adapter = snapshot(model), case.attach(model)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=0.05))
    for _ in range(2):
        backward(model.train()(case.x))
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(case.x)
    adapter.merge()
    hint = f"{MERGE}; the weight that the method sees is the dequantized one"
    if case.hooks.merges_weight:
        require(part_of(adapter).site.module.weight.is_floating_point(), "the merged layer is still quantized")  # type: ignore[union-attr, operator]
    close(model(case.x), expected, case.eps, "the merged layer's output", hint)
    adapter.detach()
    unchanged(model, before, "after detach()", hint)


@check(torch.float32, torch.bfloat16, layers="dense", first=True)
def files(case: Case) -> None:
    """A checkpoint that is merged on files gives the same output; unmerging it restores the same bits."""
    model = case.untouched()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        _write_checkpoint(model, root / "base")
        adapter = case.attach(model)
        _nudge(adapter.parameters())
        expected = model(case.x)
        adapter.save(root / "adapter")
        merge_checkpoint(root / "base", root / "adapter", root / "merged", kinds={LAYER: case.kind.name})
        unmerge_checkpoint(root / "merged", root / "restored")
        states = {name: _read_checkpoint(root / name) for name in ("base", "merged", "restored")}
    merged = case.untouched()
    merged.load_state_dict(states["merged"])
    close(merged(case.x), expected, case.eps, "the output of the checkpoint that was merged on files", f"{MERGE}, and look at `rows`")
    for name, tensor in states["base"].items():
        same_bits(states["restored"][name], tensor, f"{name} in the unmerged checkpoint", "look at adapter_unmerge")


@torch.no_grad()
def _nudge(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))


def _write_checkpoint(model: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"model_type": "conformance"}\n', encoding="utf-8")


def _read_checkpoint(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load((directory / "model.safetensors").read_bytes())
