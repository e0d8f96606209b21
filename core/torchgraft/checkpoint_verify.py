"""Reading back what a merge wrote, and comparing it with the same formula in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torchgraft.bases import PairedSite
from torchgraft.checkpoint import read_tensor
from torchgraft.errors import MergeError
from torchgraft.merge_job import Merge, relative_name
from torchgraft.site import to_canonical

SAMPLED_ROWS = 64


def verify_merge(merge: Merge, directory: Path) -> None:
    """Read back what was written and compare it with the same formula in float64."""
    changed = merge.changed
    for header in merge.checkpoint.headers:
        with (directory / relative_name(merge.checkpoint, header)).open("rb") as written, header.path.open("rb") as source:
            for entry in header.in_file_order:
                if entry.name in changed:
                    _verify_tensor(merge, entry.name, read_tensor(source, entry), read_tensor(written, entry))


def _verify_tensor(merge: Merge, name: str, original: Tensor, written: Tensor) -> None:
    if name in merge.replaced:
        right = written.equal(merge.tensors[merge.replaced[name]].to(original.dtype))
    else:
        right = _rows_agree(merge, merge.sites[name], original, written)
    if not right:
        raise MergeError(
            f"{name}: what was written differs from the float64 reference; the disk or the arithmetic is at fault. Nothing was left behind"
        )


def _rows_agree(merge: Merge, paired: PairedSite, original: Tensor, written: Tensor) -> bool:
    kind, hooks = paired.site.kind, merge.hooks
    params = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in merge.params(paired).items()}
    weight, found = to_canonical(kind, original).double(), to_canonical(kind, written).double()
    stride = max(1, len(weight) // SAMPLED_ROWS) if hooks.merges_rows else 1
    for first in range(0, len(weight), stride) if hooks.merges_rows else [0]:
        rows = slice(first, first + 1) if hooks.merges_rows else slice(None)
        expected = hooks.merge(paired.config, params, weight[rows], rows)
        rounding = torch.finfo(original.dtype).eps * expected.abs()
        smallest = torch.finfo(original.dtype).smallest_normal * torch.finfo(original.dtype).eps
        arithmetic = smallest + 16 * torch.finfo(torch.float32).eps * (expected.abs().amax() + weight[rows].abs().amax())
        if not ((found[rows] - expected).abs() <= rounding + arithmetic).all():
            return False
    return True
