"""The error classes. Every message states the layer or file, what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class TorchgraftError(Exception):
    """The input is invalid. The command line prints the message as one line and exits with 2."""


class SelectionError(TorchgraftError):
    """A pattern is malformed or matches nothing."""


class ConfigError(TorchgraftError):
    """A method's option is unknown or its value is out of range."""


class PluginError(TorchgraftError):
    """A plugin cannot be found or loaded, breaks a rule, or has a name that is taken."""


class FileFormatError(TorchgraftError):
    """A file is missing or does not follow its format."""


class PairingError(TorchgraftError):
    """An adapter does not fit a base. `problems` lists every reason."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


class AttachError(TorchgraftError):
    """A layer or a model cannot carry the adapter."""


class MergeError(TorchgraftError):
    """A merge or unmerge is refused; the weights are unchanged."""


class ConformanceError(TorchgraftError, AssertionError):
    """A method fails the conformance kit. The message is the whole report."""


class TorchgraftWarning(UserWarning):
    """Something is allowed, but probably not intended."""


def near(query: str, names: Iterable[str]) -> str:
    """Return "; near names: …" with up to three of `names` that resemble `query`, or an empty string."""
    import difflib  # only needed for error messages: not at start-up

    found = difflib.get_close_matches(query, sorted(set(names)), n=3, cutoff=0.5)
    return f"; near names: {', '.join(found)}" if found else ""
