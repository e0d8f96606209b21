"""Describe what a plugin provides and what a method can do, for `adapt plugins`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchgraft.plugin.info import PluginInfo
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry
from torchgraft_cli.output import plain

PROVIDED = {"adapter_method": "a method", "layer_kind": "a kind of layer", "register_commands": "commands of adapt"}


def listed(info: PluginInfo) -> dict[str, Any]:
    """Return one entry of `adapt plugins list --json`."""
    return {**_origin(info), "error": info.error or None, "provides": [] if info.error else list(registry().provides(info.name))}


def summary_of(info: PluginInfo) -> str:
    """Return what the plugin does, or why it cannot be used and what to do about it."""
    if info.error:
        return plain(f"cannot be used: {info.error}; {info.way_out}")
    provides = registry().provides(info.name)
    return registry().method(info.name).summary if "adapter_method" in provides else _in_words(provides, _kind(info))


def described(info: PluginInfo) -> dict[str, Any]:
    """Return the document of `adapt plugins show --json`."""
    provides = registry().provides(info.name)
    document = {**_origin(info), "provides": list(provides), "kind": _kind(info)}
    if "adapter_method" not in provides:
        return document
    hooks = registry().hooks(info.name)
    method = hooks.method
    return document | {
        "summary": method.summary,
        "reference": method.reference,
        "kinds": sorted(method.kinds) if method.kinds is not None else None,
        "capabilities": _capabilities(hooks),
        "options": [_option(key, field) for key, field in method.config.model_json_schema().get("properties", {}).items()],
    }


def in_facts(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the document as (name, text) facts for people, without the options."""
    origin = "{distribution} {version} ({entry_point})".format(**document)
    if "capabilities" not in document:
        return {document["name"]: _in_words(document["provides"], document["kind"]), "from": origin}
    can = document["capabilities"]
    order = "in any order, with factors" if can["additive"] else "in the order in which adapters were attached"
    merges = [
        order,
        "by blocks of rows" if can["merges_rows"] else "with whole weights in memory",
        *(["with the bias"] * can["merges_bias"]),
    ]
    forms = [form for form, there in (("PEFT's format", can["peft"]), ("a plain LoRA", can["to_lora"])) if there]
    return {
        document["name"]: document["summary"],
        "reference": document["reference"],
        "from": origin,
        "works on": ", ".join(document["kinds"]) if document["kinds"] else "all kinds of layers",
        "merges": ", ".join(merges),
        "exports to": " and ".join(forms) or "torchgraft's own format alone",
    }


def _origin(info: PluginInfo) -> dict[str, str]:
    return {key: getattr(info, key) for key in ("name", "distribution", "version", "entry_point")}


def _kind(info: PluginInfo) -> str | None:
    """Return the name of the kind of layer that the plugin adds."""
    kind = registry().kind_of_plugin(info.name)
    return kind.name if kind is not None else None


def _in_words(provides: Sequence[str], kind: str | None) -> str:
    """Return in words what the hooks of a plugin provide."""
    found = [f"{words}, {kind}" if hook == "layer_kind" else words for hook, words in PROVIDED.items() if hook in provides]
    watched = [hook for hook in provides if hook.startswith("adapter_")]
    if watched and "adapter_method" not in provides:
        found.append(f"an observer of {', '.join(watched)}")
    return ", ".join(found) or "nothing"


def _capabilities(hooks: MethodHooks) -> dict[str, bool]:
    """Return what the method declares, or what its hooks show."""
    method = hooks.method
    return {
        "additive": method.additive,
        "merges_rows": hooks.merges_rows,
        "merges_bias": hooks.merges_bias,
        "to_lora": hooks.has("adapter_to_lora"),
        "peft": method.peft is not None,
        "starts_unchanged": method.starts_unchanged,
        "compiles": method.compiles,
    }


def _option(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    schema = schema | next((form for form in schema.get("anyOf", ()) if form.get("type") != "null"), {})
    values = ", ".join(map(str, schema["enum"])) if "enum" in schema else schema.get("type", "")
    values += "".join(f" {sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)
    return {"name": name, "default": schema.get("default"), "values": values, "help": schema.get("description", "")}
