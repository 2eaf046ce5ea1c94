"""Errors that the commands raise on purpose: the message says what is wrong and what to do."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message has its key, the value and the expected values."""


class UsageError(ValueError):
    """A request that cannot be carried out here."""


class DataError(ValueError):
    """The data cannot be used as requested."""


class StoreError(DataError):
    """What a store holds cannot be read, or has other content than was written."""


class InspectionError(ValueError):
    """A text or model that cannot be displayed."""


class RunError(RuntimeError):
    """A run that cannot begin as requested."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read, written or used."""


class DamagedFile(RuntimeError):
    """A file of a run or a sweep has other content than was written."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Stopped(RuntimeError):
    """A signal stopped the run; the message says what was saved.

    Attributes:
        signal: the signal's number; by convention a process that it ends exits with 128 plus this
            number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class RankFailed(RuntimeError):
    """A rank died or raised an unexpected exception; the message shows which one and its error."""
