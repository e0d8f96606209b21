"""Create pluggy's manager, and check a plugin before it is registered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pluggy

from torchgraft.errors import PluginError, near
from torchgraft.method.method import Method
from torchgraft.plugin import hookspecs
from torchgraft.plugin.info import PluginInfo

PROVIDING_HOOKS = ("adapter_method", "layer_kind", "register_commands")
"""The hooks with which a plugin provides something new; the other hooks belong to a method."""


class _Manager(pluggy.PluginManager):
    """Call a method's own implementation last, because its result ends the call and observers must see every call."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        options = super().parse_hookimpl_opts(plugin, name)
        if options is not None and hasattr(plugin, "adapter_method") and not (options["wrapper"] or options["hookwrapper"]):
            options["trylast"] = True
        return options


def new_manager() -> pluggy.PluginManager:
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def own_hooks(manager: pluggy.PluginManager, plugin: object) -> dict[str, pluggy.HookImpl]:
    callers = manager.get_hookcallers(plugin) or []
    return {caller.name: impl for caller in callers for impl in caller.get_hookimpls() if impl.plugin is plugin}


def check_hooks(plugin: object, name: str) -> None:
    """Register the plugin with a manager of its own first, because pluggy leaves a plugin half registered if a signature is wrong.

    Raises:
        PluginError: a hook or its signature is unknown, or the plugin cannot be hashed.
    """
    trial = new_manager()
    try:
        hash(plugin)
    except TypeError as error:
        raise PluginError(f"it is not hashable ({error}); a dataclass needs eq=False") from None
    try:
        trial.register(plugin, name)
        trial.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(" ".join(str(error).split()) + _expected_arguments(trial, str(error))) from None
    for hook, impl in own_hooks(trial, plugin).items():
        if hook in PROVIDING_HOOKS and (impl.wrapper or impl.hookwrapper):
            raise PluginError(f"it wraps {hook}, which cannot be wrapped because it provides something new")


def _expected_arguments(trial: pluggy.PluginManager, error: str) -> str:
    """Return what to add to pluggy's `error`: the arguments of the hook that it names, or near names of an unknown hook."""
    callers = [caller for caller in vars(trial.hook).values() if isinstance(caller, pluggy.HookCaller)]
    known = {caller.name: caller.spec for caller in callers if caller.spec is not None}
    quoted = re.findall(r"'(\w+)'", error)
    for name in quoted:
        if name in known:
            return f"; {name} takes {', '.join(known[name].argnames) or 'no arguments'}"
    return near(quoted[0], known) if "unknown hook" in error and quoted else ""


def only_observe(own: Mapping[str, pluggy.HookImpl], info: PluginInfo) -> None:
    """Make sure that hooks of a plugin without a method return nothing unless they wrap, because the first result ends a call."""
    for name, impl in own.items():
        if name not in PROVIDING_HOOKS and not (impl.wrapper or impl.hookwrapper):
            impl.function = partial(  # type: ignore[misc]
                _observe, impl.function, f"the plugin {info}: {name}"
            )


def _observe(function: Callable[..., Any], where: str, *arguments: Any) -> None:
    if function(*arguments) is not None:
        raise PluginError(f"{where} returned something, which would replace the method's result; to change that, use wrapper=True")


def _only_bias(own: Mapping[str, pluggy.HookImpl]) -> bool:
    return "adapter_merge_bias" in own and "adapter_merge" not in own and "adapter_unmerge" not in own


def method_of(own: Mapping[str, pluggy.HookImpl], info: PluginInfo) -> Method:
    """Return the method of a plugin.

    Raises:
        PluginError: a required hook is missing, or `adapter_method` does not return a `Method` of the entry point's name.
    """
    needed = hookspecs.METHOD_HOOKS[:2] if _only_bias(own) else hookspecs.METHOD_HOOKS
    missing = [name for name in needed if name not in own]
    if missing:
        raise PluginError(f"it has adapter_method but not {', '.join(missing)}")
    method = own["adapter_method"].function()
    if not isinstance(method, Method):
        raise PluginError(f"its adapter_method returned a {type(method).__name__}, not a torchgraft.Method")
    if method.name != info.name:
        raise PluginError(f"its method is called {method.name!r} and its entry point {info.name!r}; they must be the same")
    return method
