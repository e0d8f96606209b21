"""The registry: lazy loading, third-party plugins that misbehave, names that clash, the allow-list."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import torchgraft as tg
from installed import METHOD, Installed

PARAMS = {"v": torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0])}
WEIGHT = torch.arange(15.0).reshape(5, 3)


def test_a_method_is_loaded_alone_and_when_it_is_asked_for(installed: Installed) -> None:
    modules = {name: installed.add(name, distribution=name) for name in ("one", "two")}
    registry = installed.registry()
    assert not set(modules.values()) & set(sys.modules)
    assert registry.method("two").name == "two"
    assert (modules["one"] in sys.modules, modules["two"] in sys.modules) == (False, True)
    assert [info.name for info in registry.plugins()] == ["one", "two"]
    assert modules["one"] in sys.modules


def test_installed_distributions_are_found_beside_the_bundled_plugins(installed: Installed) -> None:
    module = installed.add("extra", distribution="torchgraft-extra", version="4.5")
    found = {info.name: info for info in tg.Registry().plugins()}
    assert (found["extra"].distribution, found["extra"].version, found["extra"].entry_point) == ("torchgraft-extra", "4.5", module)
    assert (found["lora"].distribution, found["lora"].error) == ("torchgraft", "")


BROKEN: dict[str, tuple[str, str]] = {
    "raises on import": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "exits on import": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax error": ("def (", "SyntaxError"),
    "wrong argument": (METHOD.replace("params, x, base", "params, x, layer").replace("base(x)", "layer(x)"), "adapter_forward.*layer"),
    "unknown hook": (METHOD + "\n@hookimpl\ndef adapter_mirge(weight):\n    return weight\n", "adapter_mirge"),
    "no merge": (METHOD.replace("adapter_merge", "elsewhere").replace("@hookimpl\ndef elsewhere", "def elsewhere"), "not adapter_merge"),
    "another name": (METHOD.replace('"NAME"', '"other"'), "called 'other' and its entry point 'bad'"),
    "no Method": (
        METHOD.replace("tg.Method(", "dict(a=").replace(', tg.LowRankConfig, "adds', ', b="').replace(', "none"', ""),
        "dict, not",
    ),
    "method raises": (METHOD.replace("return tg.Method", "raise ValueError('odd')\n    return tg.Method"), "ValueError: odd"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_harms_no_other(case: str, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = BROKEN[case]
    module = installed.add("bad", source, distribution="bad-tools", version="0.3")
    installed.add("good", distribution="good-tools")
    registry = installed.registry()
    with pytest.raises(tg.PluginError, match=rf"(?s)bad \({module}, from bad-tools 0\.3\) cannot be used: .*{reason}"):
        registry.method("bad")
    errors = {info.name: info.error for info in registry.plugins()}
    assert errors["bad"]
    assert errors["good"] == ""
    torch.testing.assert_close(registry.hooks("good").merge(None, PARAMS, WEIGHT), WEIGHT + PARAMS["v"][:, None])
    assert [method.name for method in registry.methods()] == ["good"]
    with pytest.warns(tg.TorchgraftWarning, match=rf"bad \({module}, from bad-tools 0\.3\) is left out"):
        assert installed.registry().hooks("good").method.name == "good"
    monkeypatch.setenv("TORCHGRAFT_STRICT", "1")
    for ask in (tg.Registry.plugins, tg.Registry.methods, lambda registry: registry.hooks("good")):
        with pytest.raises(tg.PluginError, match=rf"bad \({module}, from bad-tools 0\.3\) cannot be used"):
            ask(installed.registry())


def test_of_two_distributions_with_one_name_neither_is_usable(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [installed.add("twin", distribution=distribution) for distribution in ("first-tools", "second-tools")]
    installed.add("good", distribution="good-tools")
    registry = installed.registry()
    with pytest.raises(tg.PluginError, match="first-tools") as caught:
        registry.method("twin")
    assert "second-tools" in str(caught.value)
    assert not set(modules) & set(sys.modules)
    twins = [info for info in registry.plugins() if info.name == "twin"]
    assert {info.distribution for info in twins} == {"first-tools", "second-tools"}
    assert all("first-tools" in info.error and "second-tools" in info.error for info in twins)
    assert [method.name for method in registry.methods()] == ["good"]
    monkeypatch.setenv("TORCHGRAFT_STRICT", "1")
    with pytest.raises(tg.PluginError, match=r"of twin .*second-tools.* is taken by twin .*first-tools"):
        installed.registry()


@pytest.mark.parametrize("other", ["aaa-first-by-name", "zzz-last-by-name"])
def test_a_bundled_name_stays_with_its_owner(other: str, installed: Installed) -> None:
    bundled = installed.add("own", distribution="torchgraft")
    taker = installed.add("own", METHOD.replace("adds a vector", "takes a name"), distribution=other)
    registry = installed.registry()
    assert registry.method("own").summary.startswith("adds a vector")
    assert registry.info("own").entry_point == bundled
    (refused,) = [info for info in registry.plugins() if info.error]
    assert (refused.distribution, refused.entry_point) == (other, taker)
    assert f"from {other}" in refused.error
    assert "from torchgraft" in refused.error
    assert taker not in sys.modules


@pytest.mark.parametrize(
    ("allowed", "names"), [(None, ["own", "a", "b"]), ("", ["own"]), ("a", ["own", "a"]), (" b , a", ["own", "a", "b"]), ("c", ["own"])]
)
def test_the_allow_list_concerns_other_distributions(
    allowed: str | None, names: list[str], installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: installed.add(name, distribution=name if name != "own" else "torchgraft") for name in ("own", "a", "b")}
    if allowed is not None:
        monkeypatch.setenv("TORCHGRAFT_PLUGINS", allowed)
    registry = installed.registry()
    assert [info.name for info in registry.plugins()] == names
    assert {name for name in modules if modules[name] in sys.modules} == set(names)


def test_an_unknown_plugin_is_refused_with_near_names(installed: Installed) -> None:
    installed.add("rotation")
    with pytest.raises(tg.PluginError, match=r"no plugin 'rotatoin'; near names: rotation"):
        installed.registry().method("rotatoin")
    with pytest.raises(tg.PluginError, match="no kind of layer 'Lineer'"):
        installed.registry().kind("Lineer")


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(tg.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    checked = {name.asname: f"{node.module}.{name.name}" for node in imports for name in node.names}
    homes = {name: f"torchgraft.{home}.{name}" for name, home in tg._HOME_OF.items()} | {name: f"torchgraft.{name}" for name in tg._MODULES}
    assert homes == checked
    assert set(tg.__all__) == {*checked, "__version__"}
    for name in tg.__all__:
        value = getattr(tg, name)
        assert getattr(value, "__name__", name).rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = tg.aply


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ("torchgraft>=0.1,<0.2", True),
        ("Torchgraft", True),
        ("torchgraft>=99", False),
        ("torchgraft<0.1", False),
        ("torchgraft>=99; python_version < '3'", True),
        ("torchgraft>=99; extra == 'test'", True),
        ("other>=99", True),
    ],
)
def test_a_plugin_for_another_version_is_left_out_and_says_which(requires: str, fits: bool, installed: Installed) -> None:
    module = installed.add("old", distribution="old-tools", version="0.3", requires=requires)
    registry = installed.registry()
    if fits:
        assert registry.method("old").name == "old"
        return
    with pytest.raises(
        tg.PluginError, match=rf"old \({module}, from old-tools 0\.3\) cannot be used: it requires torchgraft.*, and this is"
    ):
        registry.method("old")
    assert module not in sys.modules


KIND = """
import torchgraft as tg
from torchgraft.kinds.dense import Linear

class Own(Linear):
    name = "NAME"

@tg.hookimpl
def layer_kind():
    return Own()
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (KIND.replace('"NAME"', '"Linear"'), "called 'Linear', and so is one of torchgraft itself"),
        (KIND.replace('"NAME"', '"taken"'), "called 'taken', and so is one of a_first"),
        (KIND.replace("return Own()", "return 'Own'"), "returned a str, not a torchgraft.Kind"),
        (KIND.replace("return Own()", "raise ValueError('odd')"), "ValueError: odd"),
    ],
)
def test_a_kind_that_cannot_be_used_is_left_out(source: str, reason: str, installed: Installed) -> None:
    installed.add("a_first", KIND.replace('"NAME"', '"taken"'), distribution="first-tools")
    installed.add("bad", source, distribution="bad-tools")
    registry = installed.registry()
    with pytest.warns(tg.TorchgraftWarning, match=f"bad .*from bad-tools 1.2.* is left out: .*{reason}"):
        kinds = [kind.name for kind in registry.kinds()]
    assert kinds.count("taken") == kinds.count("Linear") == 1


def test_a_kind_that_cannot_name_its_class_is_left_out(installed: Installed) -> None:
    installed.add("bad", KIND + "Own.module_class = lambda self: __import__('no_such_library')\n")
    registry = installed.registry()
    with pytest.warns(tg.TorchgraftWarning, match="bad .* is left out: ModuleNotFoundError: No module named 'no_such_library'"):
        assert "bad" not in {kind.name for kind in registry.kinds()}
    assert [info.error for info in registry.plugins()] == ["ModuleNotFoundError: No module named 'no_such_library'"]


def test_strict_is_fatal_every_time(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.add("bad", "import no_such_module_at_all", distribution="bad-tools")
    installed.add("good", distribution="good-tools")
    monkeypatch.setenv("TORCHGRAFT_STRICT", "1")
    registry = installed.registry()
    for _ in range(2):
        with pytest.raises(tg.PluginError, match=r"bad .*from bad-tools.* cannot be used: ModuleNotFoundError"):
            registry.hooks("good")
    with pytest.raises(tg.PluginError, match=r"bad .*cannot be used: ModuleNotFoundError"):
        registry.method("bad")
