"""The hooks that a plugin can provide. `from torchgraft import hookimpl` marks an implementation.

A hook may leave out arguments that it does not need, but not rename them. The hooks of a method (adapter_*) are called
for that method's own plugin alone; a plugin without a method can observe or wrap any of them but adapter_method, and
sees every call on adapters that are attached or loaded after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from torchgraft.kinds.kind import Kind, Shape
from torchgraft.method.method import Method

if TYPE_CHECKING:
    import click
    from torch import Generator, Tensor, nn
    from torch.optim import Optimizer

    from torchgraft.method.resize import Resize
    from torchgraft.method.site import Site

PROJECT = "torchgraft"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class PartView(Protocol):
    """What a hook that is given the whole adapter may use of its part on one site."""

    @property
    def site(self) -> Site: ...
    @property
    def config(self) -> Any:
        """The method's own class of config, with the overrides for this site."""

    def tensors(self) -> dict[str, Tensor]:
        """The site's own tensors, buffers included."""

    def params(self) -> dict[str, Tensor]:
        """The site's own tensors and those that `adapter_shared` made: what the other hooks are given."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that are trained."""


class CopyView(Protocol):
    """What such a hook may use of a module that is trained whole."""

    @property
    def module(self) -> nn.Module: ...


class AdapterView(Protocol):
    """What `adapter_param_groups` and `adapter_step` may use of the adapter that they are given."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any:
        """The method's own class of config, without overrides."""

    @property
    def state(self) -> dict[str, Any]:
        """Tensors, and values that JSON can hold, that the method keeps between its steps. Saved with the adapter."""

    @property
    def parts(self) -> Mapping[str, PartView]:
        """By the site's name."""

    @property
    def copies(self) -> Mapping[str, CopyView]:
        """By the name of the module that is trained whole."""

    def resize(self, sites: Mapping[str, Resize], optimizer: Optimizer) -> None:
        """Give sites tensors of other shapes; the optimizer's moments follow."""


@hookspec(firstresult=True)
def adapter_method() -> Method:  # type: ignore[empty-body]
    """Name the method that this plugin provides. Called once, when the plugin is loaded; it must be cheap."""


@hookspec(firstresult=True)
def adapter_shapes(site: Site, config: Any) -> dict[str, Shape]:  # type: ignore[empty-body]
    """Name → shape of the tensors that `adapter_init` will return. Called to count and to check without torch.

    Optional: without it, `adapter_init` is run on a weight without values to find out.
    """


@hookspec(firstresult=True)
def adapter_init(site: Site, config: Any, generator: Generator) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """Make one site's tensors, on the CPU. Called when an adapter is created.

    All are trained, but those that the method lists as buffers. Draw random numbers from `generator` only: it is seeded
    by the user's seed and the site's name. `site.weight()` is the frozen weight, canonical and in float32.
    """


@hookspec(firstresult=True)
def adapter_shared(sites: Sequence[Site], config: Any) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """Tensors that all sites of an adapter share, such as frozen random matrices. Called once for each adapter. Optional.

    They are among the params that the other hooks get, on the device and in the dtype of a site's own tensors, and one object
    for all sites. They are not trained, and not saved but made again on load and merge, where a hash tells whether they are
    the same. So `sites` (in any order, perhaps without a model) and the adapter's own `config` must decide them: take a seed
    from an option, one of `Config.adapter_wide`. Make them on the CPU, and in float32 or float64.
    """


@hookspec(firstresult=True)
def adapter_forward(  # type: ignore[empty-body]
    site: Site, config: Any, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor:
    """The adapted layer's output for the input `x`, in the dtype of `base(x)`. Called in every forward pass.

    `base(x)` is the output without this adapter. `site.project_in` and `site.project_out` apply factors in the layer's
    own way, convolution or look-up; `site.low_rank` adds what they give, the fast way. Do not change `x` or `base(x)` in place.
    """


@hookspec(firstresult=True)
def adapter_merge(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:  # type: ignore[empty-body]
    """The weight that gives the adapted layer's output by itself. Called by merge, without gradients.

    `weight` holds the canonical rows `rows` of the frozen weight, in float32 or float64; params come in the same dtype, and
    whole. A hook that leaves out `rows` is given the whole weight. Returns a new tensor, in that dtype and shape. On files it is
    called by several threads at once.
    """


@hookspec(firstresult=True)
def adapter_undo(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """What `adapter_unmerge` needs and the merged weight does not tell, such as norms of rows. Called by merge.

    Optional. Arguments are those of `adapter_merge`. A hook that takes `rows` returns tensors with an entry for each of
    these rows; all rows' come back among `params`. They are kept with the merge, and should be small.
    """


@hookspec(firstresult=True)
def adapter_unmerge(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:  # type: ignore[empty-body]
    """The inverse of `adapter_merge`, as near as arithmetic allows. Called by merge and unmerge.

    It need not be exact: what it misses is recorded when merging, and put right after it. The nearer it comes, the smaller
    that record. Of an additive method it is not called: what `adapter_merge` makes of zeros is taken away.
    """


@hookspec(firstresult=True)
def adapter_merge_bias(config: Any, params: Mapping[str, Tensor], bias: Tensor) -> Tensor:  # type: ignore[empty-body]
    """The bias of the adapted layer, from `bias` (out_features,). Called by merge, in float64, and where another adapter lies above.

    Optional: without it a bias stays as it is. Returns a new tensor, or `bias` itself, and does not write to it. There is no
    inverse to write: unmerge gives back the original. Of an additive method, what it makes of zeros is added. It must leave
    zeros alone for a layer that has no bias (`site.has_bias`), else merge refuses; `Config.advise` can refuse such a layer before.
    For an adapter above, which asks for `site.bias`, it is called in forward: on bias and params as they are, with gradients.
    """


@hookspec(firstresult=True)
def adapter_to_lora(site: Site, config: Any, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:  # type: ignore[empty-body]
    """(s, {"A", "B"}) of the plain LoRA that is the same function: ΔW = s·B·A. Called by `adapt export --to lora`.

    Optional: a method whose change is not of that form leaves it out.
    """


@hookspec(firstresult=True)
def adapter_prepare(site: Site, config: Any) -> nn.Module | None:
    """A layer to take the place of the site's own, before its tensors are made or loaded: one with a quantised weight. Optional.

    The site's module gets its class and contents, and stays the same object. None leaves the layer as it is.
    """


@hookspec(firstresult=True)
def adapter_param_groups(adapter: AdapterView, lr: float, weight_decay: float) -> list[dict[str, Any]] | None:
    """Parameter groups for a torch optimizer. Optional: without it there is one group with `lr` and `weight_decay`."""


@hookspec(firstresult=True)
def adapter_penalty(site: Site, config: Any, params: Mapping[str, Tensor]) -> Tensor | None:
    """A term of one site to be added to the loss. Optional; `adapter.penalty()` sums it over the sites."""


@hookspec(firstresult=True)
def adapter_step(adapter: AdapterView, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
    """Called by `adapter.step(…)` after each optimizer step, while the gradients are still there. Optional.

    For methods that change ranks or schedules. `adapter.state` keeps what the method needs the next time, and is saved;
    `adapter.resize(…)` changes shapes together with the optimizer's moments.
    """


@hookspec
def layer_kind() -> Kind:  # type: ignore[empty-body]
    """A further kind of layer, which all methods can then adapt. It is asked before the built-in ones."""


@hookspec
def register_commands(commands: click.Group) -> None:
    """Add commands to `adapt`: `@commands.command()`, or `commands.add_command(…)`.

    Called when `adapt` lists its commands, and when it is given one that is not its own; import torch inside the command.
    A command whose name is taken is left out. For a user's mistake raise TorchgraftError or click's exceptions: they become
    one line and exit code 2.
    """


METHOD_HOOKS = ("adapter_init", "adapter_forward", "adapter_merge", "adapter_unmerge")
"""What a plugin that has a method must provide; the last two not if it has adapter_merge_bias and leaves weights alone."""
