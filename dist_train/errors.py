"""The failures a user can meet, each with the exit code that scripts and schedulers rely on. Torch-free."""

from __future__ import annotations


class ToolkitError(Exception):
    """A failure with a message for the user: what was given, what is allowed, what to change, where it was set.

    Shown as one block without a traceback; `exit_code` becomes the exit status of the command.
    """

    exit_code = 1
    title = "error"

    def __init__(self, message: str, *keys: str) -> None:
        """keys: the settings to change, where the one who refuses them does not know where they were set."""
        super().__init__(message)
        self.keys = keys


class ConfigError(ToolkitError):
    exit_code = 2
    title = "config error"


class UnmeasuredError(ConfigError):
    """The model could not be measured apart from its training."""


class DataError(ToolkitError):
    exit_code = 3
    title = "data error"


class UnsafeInputError(ToolkitError):
    exit_code = 4
    title = "unsafe input refused"


class NumericError(ToolkitError):
    exit_code = 10
    title = "numeric error"


class CheckpointError(ToolkitError):
    exit_code = 11
    title = "no valid checkpoint"


class BusyError(ToolkitError):
    exit_code = 12
    title = "run directory in use"


class StorageError(ToolkitError):
    exit_code = 13
    title = "storage error"


class HangError(ToolkitError):
    exit_code = 14
    title = "a rank is missing"


class CrashError(ToolkitError):
    exit_code = 15
    title = "a worker crashed"


class NodeLostError(HangError):
    """A whole node is gone: its ranks cannot be started again from here."""


class KilledError(CrashError):
    """A rank died without a word: what the others then say of it is no cause."""


class StoppedError(ToolkitError):
    """Ended by a signal before all was saved."""

    exit_code = 130
    title = "stopped"


class Preempted(ToolkitError):  # noqa: N818 - not an error: everything was saved
    exit_code = 75
    title = "stopped and saved"


def error_for_code(exit_code: int) -> type[ToolkitError]:
    """The error class that owns `exit_code`; CrashError for a code that none owns."""
    for kind in ToolkitError.__subclasses__():
        if kind.exit_code == exit_code:
            return kind
    return CrashError
