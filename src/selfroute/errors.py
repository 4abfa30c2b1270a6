"""Errors, flat, each named by the boundary that failed.

    SelfrouteError
    ├── ConfigError      a config file, an override or an argument
    ├── TaskError        a data file or a generator
    ├── DeviceError      the on-device model or its engine (RejectedError: it takes no such request; ContextError: for
    │                    its conversation is too long)
    ├── CloudError       the cloud, its cache or its ledger
    ├── TrainingError    the training loop (checkpoints, its files)
    ├── ExportError      a model that cannot be written for another engine
    ├── DivergenceError  a model whose numbers are not finite
    ├── RunError         a run directory (missing, foreign, damaged)
    └── StoreError       the gateway's store of requests, budgets and keys (SilentStoreError: it does not answer)

Every message names the cause and the way out. The CLI prints them without a traceback and exits with 1.
"""


class SelfrouteError(Exception):
    """Base of everything that selfroute raises on purpose."""


class ConfigError(SelfrouteError):
    """A config file, an override or an argument cannot be used."""


class TaskError(SelfrouteError):
    """A data file or a generator cannot give the problems that were asked for."""


class DeviceError(SelfrouteError):
    """The on-device model cannot be loaded or run."""


class RejectedError(DeviceError):
    """The on-device model, or its engine, does not take a request as it is, whenever it comes."""


class ContextError(RejectedError):
    """The conversation, with the room for its answer, is longer than the on-device model's context."""


class CloudError(SelfrouteError):
    """The cloud, its cache or its ledger failed. Never scored as a wrong answer.

    `status` is the HTTP status with which a provider refused, `said` its words, `retry_after_s` for how long it asks to
    be left alone.
    """

    def __init__(
        self, text: str, *, status: int | None = None, said: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.said, self.retry_after_s = status, said, retry_after_s


class TrainingError(SelfrouteError):
    """Training cannot go on: a checkpoint that does not fit, a file that cannot be written."""


class ExportError(SelfrouteError):
    """A trained model cannot be written for another engine."""


class DivergenceError(SelfrouteError):
    """A loss, a gradient or a model's output is not finite: the settings are at fault, not the machine."""


class RunError(SelfrouteError):
    """A run directory is missing, belongs to other settings, or is damaged."""


class StoreError(SelfrouteError):
    """The gateway's store cannot be opened, read or written."""


class SilentStoreError(StoreError):
    """The gateway's store does not answer in time."""


class DataWarning(UserWarning):
    """Problems are not what was to be expected, such as test problems among those for training."""


class TrainingWarning(UserWarning):
    """A training goes on, and learns nothing."""


class ReproducibilityWarning(UserWarning):
    """A run goes on under other conditions than it began, and its numbers will differ by rounding."""
