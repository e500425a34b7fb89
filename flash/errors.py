"""
Every error Flash raises on purpose.

    FlashError                      exit 1
    ├── SpecError                   exit 2   the TOML, an overlay or --set; carries every Problem
    ├── UsageError                  exit 2   the command line names something that is not there
    ├── EnvironmentFault            exit 2   the environment fails to load or breaks its contract
    ├── TrainingDataError           exit 2   the rows cannot be trained as asked
    ├── ModelUnavailable            exit 2   the model cannot be found or read here
    ├── PluginError                 exit 3   a plugin is missing, unusable or misbehaves
    ├── StoreError                  exit 1   disk, database or checkpoint trouble
    │   └── DiskTrouble                      the disk is full or fails, which may pass
    └── ProviderError               exit 1   what a provider can answer with
        ├── AuthFailed  Denied  NoFunds  QuotaExceeded  NoCapacity  BadRequest  NameTaken
        ├── NotFound  NotYet  RateLimited(retry_after_s)  ServerFault  Unreachable(sent)
        └── BadAnswer  NotSupported

The message says what happened and where; `hint` says what to do next. The CLI prints both and
exits with `exit_code`; anything that is not a FlashError is a defect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.values import Problem


class FlashError(Exception):
    """A failure with a sentence for people; root of every error Flash raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[FlashError], args: tuple[Any, ...], state: dict[str, Any]) -> FlashError:
    """Unpickle without calling `__init__`, whose keyword arguments pickle does not know."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class SpecError(FlashError):
    """
    The spec is wrong; `problems` holds all of them, sorted by path.

    Where every error among them is a plugin's fault, the exit code is a plugin's too.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.path))
        super().__init__("\n".join(str(problem) for problem in self.problems), hint=hint)
        errors = [problem for problem in self.problems if problem.severity == "error"]
        if errors and all(problem.fault == "plugin" for problem in errors):
            self.exit_code = PluginError.exit_code


class UsageError(FlashError):
    """The command line names something that does not exist or does not fit."""

    exit_code = 2


class EnvironmentFault(FlashError):
    """The user's environment cannot be loaded, or an answer of it breaks the contract."""

    exit_code = 2


class TrainingDataError(FlashError):
    """The environment's rows cannot be trained as the spec asks."""

    exit_code = 2


class ModelUnavailable(FlashError):
    """The model is unknown, not cached while offline, or unreadable."""

    exit_code = 2


class PluginError(FlashError):
    """A plugin is missing, unusable, or raised where its contract does not allow it."""

    exit_code = 3


class StoreError(FlashError):
    """The disk, the database or a checkpoint failed; nothing was half-written."""


class DiskTrouble(StoreError):
    """The disk is full or fails, or too many files are open: what is asked may work later."""


class ProviderError(FlashError):
    """A provider's answer; its subclass steers what the supervisor does next."""


class AuthFailed(ProviderError):
    """The credentials are missing, wrong or expired."""


class Denied(ProviderError):
    """The credentials are fine but do not allow this."""


class NoFunds(ProviderError):
    """The account cannot pay for this."""


class QuotaExceeded(ProviderError):
    """A limit of the account, not of the provider's stock, is reached."""


class NoCapacity(ProviderError):
    """The provider has none of what was asked for now."""


class BadRequest(ProviderError):
    """The provider refuses the request as malformed; repeating it cannot help."""


class NameTaken(ProviderError):
    """An instance of this name exists already."""


class NotFound(ProviderError):
    """The thing asked about does not exist (any more)."""


class NotYet(ProviderError):
    """The thing exists but is not ready for this call; ask again."""


class RateLimited(ProviderError):
    """Too many calls; `retry_after_s` is the provider's own word, or None."""

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class ServerFault(ProviderError):
    """The provider failed on its side."""


class Unreachable(ProviderError):
    """No answer; `sent` says whether the request may have arrived."""

    def __init__(self, message: str, *, sent: bool, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sent = sent


class BadAnswer(ProviderError):
    """The provider's answer does not have the shape its documentation gives."""


class NotSupported(ProviderError):
    """This provider cannot do this at all; its capabilities say so beforehand."""
