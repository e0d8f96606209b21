"""The hooks that a plugin can implement. `from torchgraft import hookimpl` marks an implementation.

A hook may omit arguments that it does not need, but must not rename them. The hooks of a method (`adapter_*`) are called only
for the plugin that provides the method. A plugin without a method can observe or wrap any of them except `adapter_method`; it
then sees every call for adapters that are attached or loaded afterwards.

In all hooks, `config` is the site's config, an instance of the class in `Method.config`, and `params` maps the names of the site's
tensors (those of `adapter_init` and `adapter_shared`) to the tensors. A *canonical* weight is a matrix (out_features, in_features).
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
    """What a hook may use of an adapter's part on one site."""

    @property
    def site(self) -> Site: ...
    @property
    def config(self) -> Any:
        """The method's own class of config, with the overrides for this site."""

    def tensors(self) -> dict[str, Tensor]:
        """The site's own tensors, buffers included."""

    def params(self) -> dict[str, Tensor]:
        """The site's own tensors and those of `adapter_shared`: the `params` of the other hooks."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors."""


class CopyView(Protocol):
    """What a hook may use of a fully trained module (`also_train`)."""

    @property
    def module(self) -> nn.Module: ...


class AdapterView(Protocol):
    """What `adapter_param_groups` and `adapter_step` may use of their argument `adapter`."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any:
        """The method's own class of config, without overrides."""

    @property
    def state(self) -> dict[str, Any]:
        """What the method stores between its steps, tensors or JSON values; saved with the adapter."""

    @property
    def parts(self) -> Mapping[str, PartView]:
        """Parts by the name of their site."""

    @property
    def copies(self) -> Mapping[str, CopyView]:
        """Fully trained modules by name."""

    def resize(self, sites: Mapping[str, Resize], optimizer: Optimizer) -> None:
        """Give sites tensors of other shapes, and transform the optimizer's moments accordingly."""


@hookspec(firstresult=True)
def adapter_method() -> Method:  # type: ignore[empty-body]
    """Return the method that this plugin provides. Called once, when the plugin is loaded; it must be cheap and must not import torch."""


@hookspec(firstresult=True)
def adapter_shapes(site: Site, config: Any) -> dict[str, Shape]:  # type: ignore[empty-body]
    """Return the shapes of the tensors that `adapter_init` will return: {"A": (rank, in_features), …}.

    Optional. Called to count parameters and to check files without torch. Without it, `adapter_init` runs on the meta device instead.
    """


@hookspec(firstresult=True)
def adapter_init(site: Site, config: Any, generator: Generator) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """Return one site's tensors by name, on the CPU. Called for every site when an adapter is created, not when one is loaded.

    All of them are trained, except those listed in `Method.buffers`. Draw random numbers only from `generator`, which is seeded
    with the user's seed and the site's name. `site.weight()` is the frozen canonical weight, in float32.
    """


@hookspec(firstresult=True)
def adapter_shared(sites: Sequence[Site], config: Any) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """Return tensors that all sites of one adapter share, such as frozen random matrices. Called once for each adapter. Optional.

    They are passed to the other hooks among `params`, on the device and in the dtype of the site's own tensors. They are not trained and
    not saved: they are created again on load and merge, where their hash is compared with the recorded one. They must therefore
    depend only on `sites` (whose order may differ, and which may have no module) and on the adapter's `config`; take a seed from an
    option listed in `Config.adapter_wide`. Create them on the CPU, in float32 or float64.
    """


@hookspec(firstresult=True)
def adapter_forward(  # type: ignore[empty-body]
    site: Site, config: Any, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the output of the adapted layer for the input `x`, in the dtype of `base(x)`. Called in every forward pass.

    `base(x)` is the layer's output without this adapter. `site.project_in` and `site.project_out` apply factors as the layer
    applies its weight (as a convolution or a look-up, for example); `site.low_rank` adds their result faster. Do not modify `x` or
    `base(x)` in place.
    """


@hookspec(firstresult=True)
def adapter_merge(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:  # type: ignore[empty-body]
    """Return the weight with which the plain layer gives the output of the adapted layer. Called by merge, without gradients.

    `weight` contains the canonical rows `rows` of the frozen weight, in float32 or float64. `params` are in the same dtype, and
    complete. A hook without the argument `rows` is given the whole weight. Return a new tensor of the same dtype and shape. When files are
    merged, several threads call this hook at once.
    """


@hookspec(firstresult=True)
def adapter_undo(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Tensor]:  # type: ignore[empty-body]
    """Return what `adapter_unmerge` needs and cannot compute from the merged weight, such as row norms. Called by merge. Optional.

    The arguments are those of `adapter_merge`. A hook with the argument `rows` returns tensors with one entry for each of these rows. The
    tensors of all rows are stored with the merge, and passed to `adapter_unmerge` among `params`. They should be small.
    """


@hookspec(firstresult=True)
def adapter_unmerge(config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:  # type: ignore[empty-body]
    """Return the inverse of `adapter_merge`, as precisely as arithmetic allows. Called by merge and by unmerge.

    It need not be exact, because merge records the remaining differences and unmerge corrects them. The more precise it is, the
    smaller that record. It is not called for additive methods: there, what `adapter_merge` makes of zeros is subtracted.
    """


@hookspec(firstresult=True)
def adapter_merge_bias(config: Any, params: Mapping[str, Tensor], bias: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Return the bias of the adapted layer, computed from `bias` (out_features,). Called by merge, in float64. Optional.

    Without it, biases stay unchanged. Return a new tensor, or `bias` itself, and do not write to it. No inverse is needed, because
    unmerge restores a stored copy. For an additive method, what it makes of zeros is added. For a layer without a bias (`site.has_bias`)
    it must return zeros for zeros, otherwise merge refuses; `Config.advise` can refuse such a layer earlier. It is also
    called in forward, with gradients, when a later adapter on the same layer reads `site.bias`.
    """


@hookspec(firstresult=True)
def adapter_to_lora(site: Site, config: Any, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:  # type: ignore[empty-body]
    """Return (s, {"A": …, "B": …}) of the plain LoRA that is the same function: ΔW = s·B·A. Called by `adapt export --to lora`.

    Optional. A method whose change of the weight is not of this form leaves it out.
    """


@hookspec(firstresult=True)
def adapter_prepare(site: Site, config: Any) -> nn.Module | None:
    """Return a layer that replaces the site's own before its tensors are created or loaded, such as one with a quantized weight. Optional.

    The site's module takes over the class and contents of the returned layer, and stays the same object. None leaves the layer unchanged.
    """


@hookspec(firstresult=True)
def adapter_param_groups(adapter: AdapterView, lr: float, weight_decay: float) -> list[dict[str, Any]] | None:
    """Return parameter groups for a torch optimizer. Optional; without it there is one group with `lr` and `weight_decay`."""


@hookspec(firstresult=True)
def adapter_penalty(site: Site, config: Any, params: Mapping[str, Tensor]) -> Tensor | None:
    """Return one site's term to be added to the loss, a scalar, or None. Optional; `adapter.penalty()` returns the sum over the sites."""


@hookspec(firstresult=True)
def adapter_step(adapter: AdapterView, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
    """Change ranks or schedules after an optimizer step. Called by `adapter.step(…)` while the gradients still exist. Optional.

    `step` counts from 1, and `metrics` is what the user measured at this step, such as {"val_loss": 0.3}. `adapter.state` stores what the
    method needs at the next call; it is saved with the adapter. `adapter.resize(…)` changes shapes together with the optimizer's moments.
    """


@hookspec
def layer_kind() -> Kind:  # type: ignore[empty-body]
    """Return a new kind of layer, which every method can then adapt. It is tried before the built-in kinds."""


@hookspec
def register_commands(commands: click.Group) -> None:
    """Add commands to `adapt`: `@commands.command()` or `commands.add_command(…)`.

    Called when `adapt` lists its commands and when it is given a command that it does not know; import torch inside the command.
    A command whose name is taken is skipped. For invalid input raise TorchgraftError or one of click's exceptions: they become
    one line and exit code 2.
    """


METHOD_HOOKS = ("adapter_init", "adapter_forward", "adapter_merge", "adapter_unmerge")
"""The hooks that a plugin with a method must implement. With adapter_merge_bias, a method that changes only biases omits the last two."""
