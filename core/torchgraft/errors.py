"""What can go wrong. Every message says where, what was expected and found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class TorchgraftError(Exception):
    """A mistake in the input. The command line shows it as one line and exits with 2."""


class SelectionError(TorchgraftError):
    """A pattern is malformed or matches nothing."""


class ConfigError(TorchgraftError):
    """A method's option is unknown or its value is out of range."""


class PluginError(TorchgraftError):
    """A plugin cannot be found, loaded or trusted with a name."""


class FileFormatError(TorchgraftError):
    """A file is not what its format says it must be."""


class PairingError(TorchgraftError):
    """An adapter does not fit a base. `problems` lists every reason that was found."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


class AttachError(TorchgraftError):
    """A layer or a model cannot carry the adapter."""


class MergeError(TorchgraftError):
    """A merge or unmerge is refused; the weights are as they were."""


class ConformanceError(TorchgraftError, AssertionError):
    """A plugin's method does not do what it claims. The message is the whole report."""


class TorchgraftWarning(UserWarning):
    """Allowed, but probably not what is wanted."""


def near(query: str, names: Iterable[str]) -> str:
    """ "; near names: …" with up to three of `names` that resemble `query`, or nothing."""
    import difflib  # for what goes wrong alone: not at start-up

    found = difflib.get_close_matches(query, sorted(set(names)), n=3, cutoff=0.5)
    return f"; near names: {', '.join(found)}" if found else ""
