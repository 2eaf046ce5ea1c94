"""What the commands raise on purpose: the message says what is wrong and what to do."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message says which, what came and what is expected."""


class UsageError(ValueError):
    """What was asked for cannot be done here."""


class DataError(ValueError):
    """The data cannot be used as asked for."""


class InspectionError(ValueError):
    """A text or model that cannot be shown."""


class RunError(RuntimeError):
    """A run that cannot begin as asked for."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read, written or used."""


class DamagedFile(RuntimeError):
    """A file of a run or a sweep is not what was written there."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; the message says what was saved.

    Attributes:
        signal: the signal's number; a process that dies of it by convention exits with 128 plus
            that.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class RankFailed(RuntimeError):
    """A rank died or raised an unexpected exception; the message shows which one and its error."""
