"""Plugins as pip would install them, written into a folder of the test."""

from __future__ import annotations

import itertools
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import torchgraft as tg

COUNTER = itertools.count()
METHOD = """
import torch
import torchgraft as tg
from torchgraft import hookimpl

@hookimpl
def adapter_method():
    return tg.Method("NAME", tg.LowRankConfig, "adds a vector to every column of the weight", "none")

@hookimpl
def adapter_init(site):
    return {"v": torch.zeros(site.out_features)}

@hookimpl
def adapter_forward(params, x, base):
    return base(x) + x.sum(-1, keepdim=True) * params["v"]

@hookimpl
def adapter_merge(params, weight):
    return weight + params["v"][:, None]

@hookimpl
def adapter_unmerge(params, weight):
    return weight - params["v"][:, None]
"""


class Installed:
    """Distributions in a folder, as pip would leave them there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, source: str = METHOD, distribution: str = "stranger", version: str = "1.2", requires: str = "") -> str:
        """One distribution with one plugin; returns the name of its module."""
        module = f"registry_test_{next(COUNTER)}"
        (self.folder / f"{module}.py").write_text(source.replace("NAME", name))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}")
        (info / "entry_points.txt").write_text(f"[torchgraft]\n{name} = {module}\n")
        return module

    def points(self) -> list[EntryPoint]:
        return [point for found in distributions(path=[str(self.folder)]) for point in found.entry_points]

    def registry(self) -> tg.Registry:
        return tg.Registry(self.points())
