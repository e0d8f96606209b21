"""Find plugins through the entry-point group "torchgraft", load them one at a time, and call them through pluggy.

The name of an entry point is the name of its method. `TORCHGRAFT_PLUGINS=a,b` allows only those third-party plugins (empty: none);
`TORCHGRAFT_STRICT=1` makes the failure of any plugin fatal. Otherwise a plugin that fails affects no other.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from torchgraft.errors import PluginError, TorchgraftWarning, near
from torchgraft.kinds import dense, quantized
from torchgraft.kinds.kind import Kind
from torchgraft.method.method import Method
from torchgraft.plugin.checks import check_hooks, method_of, new_manager, only_observe, own_hooks
from torchgraft.plugin.info import DISTRIBUTION, PluginInfo, bundled_first, check_version, info_of, is_allowed, is_strict, name_taken
from torchgraft.plugin.method_hooks import MethodHooks

GROUP = "torchgraft"
BUILTIN_KINDS = (*quantized.KINDS, *dense.KINDS)  # the quantized ones first, because they are subclasses of nn.Linear


class Registry:
    """The plugin manager: pluggy behind typed methods.

    Args:
        points: the entry points to use; by default, those of the installed distributions.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        self._manager = new_manager()
        self._infos: dict[str, PluginInfo] = {}
        self._points: dict[str, EntryPoint] = {}
        self._methods: dict[str, Method] = {}
        self._kinds: dict[str, Kind] = {}
        """Plugin → its kind."""
        self._tried: set[str] = set()
        """The plugins whose kind has been asked for its module class."""
        self._callers: dict[tuple[str, str], pluggy.HookCaller] = {}
        self._refused: list[PluginInfo] = []
        self._disallowed: set[str] = set()
        """Names that TORCHGRAFT_PLUGINS does not allow."""
        for point in sorted(entry_points(group=GROUP) if points is None else points, key=bundled_first):
            self._discover(point)

    def plugins(self) -> list[PluginInfo]:
        """Try to load every plugin, and return them all."""
        for name in list(self._points):
            self._try_load(name)
        return [*self._infos.values(), *self._refused]

    def register(self, plugin: object, name: str) -> None:
        """Register a module or an object as a plugin, without an entry point.

        Raises:
            PluginError: the name is taken, or the plugin's hooks do not fit the specifications.
        """
        info = PluginInfo(name, "(registered by hand)", "", getattr(plugin, "__name__", type(plugin).__name__))
        if name in self._infos:
            raise PluginError(name_taken(info, self._infos[name]))
        if self._manager.is_registered(plugin):
            raise PluginError(f"{info}: already registered as {self._manager.get_name(plugin)!r}")
        self._add(plugin, info)
        self._infos[name] = info

    def unregister(self, name: str) -> None:
        """Remove a plugin that `register` added."""
        self._manager.unregister(name=name)
        self._forget(name)
        del self._infos[name]

    def method(self, name: str) -> Method:
        """Return the method called `name`; loads only that plugin.

        Raises:
            PluginError: no such plugin is installed, it has no method, or it cannot be loaded.
        """
        info = self.info(name)
        if name not in self._methods:
            raise PluginError(f"the plugin {info} provides no method: it has no adapter_method hook")
        return self._methods[name]

    def info(self, name: str) -> PluginInfo:
        """Load the plugin `name`, and return its information.

        Raises:
            PluginError: no such plugin is installed, or it cannot be loaded.
        """
        if name in self._disallowed and name not in self._infos:
            raise PluginError(f"the plugin {name!r} is installed, and left out by TORCHGRAFT_PLUGINS; add it there, or unset that")
        if name not in self._infos:
            raise PluginError(f"there is no plugin {name!r}{near(name, self._infos)}; 'adapt plugins list' shows those installed")
        self._try_load(name)
        info = self._infos[name]
        if info.error:
            raise PluginError(f"the plugin {info} cannot be used: {info.error}; {info.way_out}")
        return info

    def provides(self, name: str) -> tuple[str, ...]:
        """Return the names of the hooks that the plugin `name` implements or wraps, sorted; none if it cannot be loaded."""
        plugin = self._manager.get_plugin(name)
        return tuple(sorted(own_hooks(self._manager, plugin))) if plugin is not None else ()

    def kind_of_plugin(self, name: str) -> Kind | None:
        """Return the kind of layer that the plugin `name` adds, if it is loaded and adds one."""
        return self._kinds.get(name)

    def implementations(self, hook: str) -> list[tuple[PluginInfo, Callable[..., Any]]]:
        """Return each plugin and its own function for `hook`, so that the caller can name the plugin that fails.

        The bundled plugins are not loaded.
        """
        self._load_all(lambda info: info.distribution != DISTRIBUTION)
        found = ((self._infos[impl.plugin_name], impl) for impl in getattr(self._manager.hook, hook).get_hookimpls())
        return [(info, partial(_call, impl)) for info, impl in found]

    def methods(self) -> list[Method]:
        """Return every method that can be loaded."""
        self._load_all()
        return list(self._methods.values())

    def hooks(self, name: str) -> MethodHooks:
        """Return the hooks of the method `name`, with every observer and wrapper around them."""
        method = self.method(name)
        self._load_all()
        return MethodHooks(method, own_hooks(self._manager, self._manager.get_plugin(name)), partial(self._caller, name))

    def kinds(self) -> tuple[Kind, ...]:
        """Return every kind of layer: those of plugins, then the built-in ones."""
        self._load_all()
        for name in [name for name in self._kinds if name not in self._tried]:
            self._tried.add(name)
            try:
                self._kinds[name].module_class()
            except Exception as error:  # noqa: BLE001  (third-party code, as in _try_load)
                self._manager.unregister(name=name)
                self._forget(name)
                self._warn(name, self._failed(name, error))
        return (*self._kinds.values(), *BUILTIN_KINDS)

    def kind(self, name: str) -> Kind:
        """Return the kind called `name`.

        Raises:
            PluginError: no plugin provides it.
        """
        found = {kind.name: kind for kind in reversed(BUILTIN_KINDS)}.get(name)
        found = found or next((kind for kind in self.kinds() if kind.name == name), None)
        if found is None:
            known = [kind.name for kind in self.kinds()]
            raise PluginError(f"there is no kind of layer {name!r}{near(name, known)}; is the plugin that adds it installed?")
        return found

    def _caller(self, method: str, hook: str) -> pluggy.HookCaller:
        """Return the hook without the implementations of the other registered methods."""
        if (method, hook) not in self._callers:
            others = [self._manager.get_plugin(other) for other in self._methods if other != method]
            self._callers[method, hook] = self._manager.subset_hook_caller(hook, others)
        return self._callers[method, hook]

    def _discover(self, point: EntryPoint) -> None:
        info = info_of(point)
        if info.distribution != DISTRIBUTION and not is_allowed(point.name):
            self._disallowed.add(point.name)
            return
        if (holder := self._infos.get(point.name)) is not None:
            self._refuse(info, holder)
            return
        self._infos[point.name] = info
        self._points[point.name] = point

    def _refuse(self, info: PluginInfo, holder: PluginInfo) -> None:
        """Refuse a name that is taken: a bundled plugin keeps it, and of two third-party plugins neither gets it."""
        if is_strict():
            raise PluginError(name_taken(info, holder))
        self._refused.append(replace(info, error=name_taken(info, holder)))
        if holder.distribution != DISTRIBUTION:
            self._infos[info.name] = replace(holder, error=name_taken(holder, info))
            self._points.pop(info.name, None)

    def _load_all(self, which: Callable[[PluginInfo], bool] = lambda info: True) -> None:
        for name in list(self._points):
            if which(self._infos[name]) and (error := self._try_load(name)):
                self._warn(name, error)
        broken = next((info for info in self._infos.values() if info.error and which(info)), None)
        if broken is not None and is_strict():
            raise PluginError(f"the plugin {broken} cannot be used: {broken.error}")

    def _warn(self, name: str, error: str) -> None:
        info = self._infos[name]
        warnings.warn(f"the plugin {info} is left out: {error}; {info.way_out}", TorchgraftWarning, stacklevel=4)

    def _try_load(self, name: str) -> str:
        """Load one plugin once; return the error, if loading failed now."""
        point = self._points.pop(name, None)
        if point is None:
            return ""
        info = self._infos[name]
        try:
            check_version(point)
            with redirect_stdout(sys.stderr):  # what a plugin prints at import must not mix with a command's output
                self._add(point.load(), info)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (third-party code: a failing import must affect only this plugin)
            return self._failed(name, error)
        return ""

    def _failed(self, name: str, error: BaseException) -> str:
        """Record that the plugin cannot be used; return the reason."""
        info = self._infos[name]
        message = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        self._infos[name] = replace(info, error=message)
        if is_strict():
            raise PluginError(f"the plugin {info} cannot be used: {message}") from error
        return message

    def _add(self, plugin: object, info: PluginInfo) -> None:
        check_hooks(plugin, info.name)
        self._callers.clear()
        self._manager.register(plugin, name=info.name)
        own = own_hooks(self._manager, plugin)
        try:
            if "adapter_method" in own:
                self._methods[info.name] = method_of(own, info)
            else:
                only_observe(own, info)
            if "layer_kind" in own:
                self._kinds[info.name] = self._kind_of(own["layer_kind"], info)
        except Exception:
            self._manager.unregister(plugin)
            self._forget(info.name)
            raise

    def _forget(self, name: str) -> None:
        """Drop everything recorded about a plugin that is no longer registered."""
        self._callers.clear()
        self._methods.pop(name, None)
        self._kinds.pop(name, None)
        self._tried.discard(name)

    def _kind_of(self, impl: pluggy.HookImpl, info: PluginInfo) -> Kind:
        kind = impl.function()
        if not isinstance(kind, Kind):
            raise PluginError(f"its layer_kind returned a {type(kind).__name__}, not a torchgraft.Kind")
        holder = next((self._infos[name] for name, other in self._kinds.items() if other.name == kind.name), None)
        if holder is not None or kind.name in {builtin.name for builtin in BUILTIN_KINDS}:
            raise PluginError(f"its kind of layer is called {kind.name!r}, and so is one of {holder or 'torchgraft itself'}")
        return kind


@cache
def registry() -> Registry:
    """Return the registry of the installed plugins, created once per process."""
    return Registry()


def _call(impl: pluggy.HookImpl, **arguments: Any) -> Any:
    return impl.function(*(arguments[name] for name in impl.argnames))
