"""The one exception that means "the user can fix this".

Every command turns a `UserError` into a single line on stderr and exit code 2. Anything else is a defect of
HLAT and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Wrong input: what is wrong, where it is (file, key) and what to write instead.

    Args:
        what: the fact, in a few words ("unknown key 'lr_rate'").
        where: the place, a file and a key if there is one ("recipes/tiny.yaml: optim.lr_rate").
        fix: what to write or do instead ("did you mean 'lr'?").
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.line())

    def line(self) -> str:
        """The message as one line, without line breaks whatever its parts hold."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text}; {self.fix}" if self.fix else text
        return " ".join(text.split())


class TrainingStopped(UserError):
    """The guard gave up: the run was healthy software on a sick loss. The last complete checkpoint is
    untouched.
    """

    exit_code = 3


class StorageFailed(UserError):
    """A disk or a store does not do its part; nothing is wrong with the input. The same command may be
    started again once it does.
    """

    exit_code = 74  # EX_IOERR of sysexits.h


class SaveFailed(StorageFailed):
    """State could not be written: a full disk, a store that does not answer. What was complete before is
    untouched.
    """


class FolderLost(UserError):
    """Another process has taken over the run folder: this one writes nothing more. What starts runs again
    (`hlat supervise`, the batch script) leaves one that ended so alone, as its successor trains.
    """

    exit_code = 77


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{purpose} needs the package '{package}'", fix=f"run: pip install 'hlat[{extra}]'")
