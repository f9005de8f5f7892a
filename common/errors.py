"""The exceptions a user can meet; the CLI prints them as one paragraph and exits with code 1.

MmkdError
 +-- ConfigError     a setting is unknown, missing or contradicts another
 +-- SourceError     the input of ingest cannot be read as asked
 +-- LakeError       the lake is missing, of another version, or not what was expected
 |    +-- FingerprintError   a partition was produced by something else
 |    +-- SchemaError        a table does not have the agreed columns
 |    +-- LeaseError         another run is at work on the partition
 +-- StorageError    an address cannot be reached, read or written
 +-- ModelError      a model cannot be found, loaded or trusted
 |    +-- TermsError      a teacher's terms need the user's consent
 |    +-- UntrustedError  a checkpoint holds more than tensors
 +-- TrainError      a training run cannot start or go on
 +-- EvaluateError   nothing can be measured with what was given
 +-- ClusterError    Ray or the job server does not offer what was asked
 +-- StoppedError    a signal came; the run ended in good order

From one process to another they travel as rows, by :func:`to_row` and :func:`from_row`: a class that only the sender
knows, or a wrapper of Ray's around it, must not hide the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping


class MmkdError(Exception):
    """Base of all errors that are the user's to mend; the message says what, where, and what to do."""

    exit_code = 1
    """Of the command that ends in it."""


class ConfigError(MmkdError):
    """A setting is unknown, missing, or contradicts another."""


class SourceError(MmkdError):
    """The input of ingest cannot be read as asked."""


class LakeError(MmkdError):
    """The lake is missing, of another version, or not what was expected."""


class FingerprintError(LakeError):
    """A partition was produced by something else than what is running now."""


class SchemaError(LakeError):
    """A table does not have the agreed columns."""


class LeaseError(LakeError):
    """Another run is at work on the partition."""


class StorageError(MmkdError):
    """An address cannot be reached, read or written."""


class ModelError(MmkdError):
    """A model cannot be found, loaded, or trusted."""


class TermsError(ModelError):
    """A teacher's terms condition models trained on its outputs, and nobody has accepted them."""


class UntrustedError(ModelError):
    """A checkpoint holds more than tensors, and reading it would run code from the file."""


class TrainError(MmkdError):
    """A training run cannot start or cannot go on."""


class EvaluateError(MmkdError):
    """Nothing can be measured with what was given."""


class ClusterError(MmkdError):
    """Ray or the job server does not offer what was asked."""


class StoppedError(MmkdError):
    """A signal came and the run ended in good order; the exit code is the one a shell gives to SIGTERM."""

    exit_code = 143


_TREE = {name: kind for name, kind in vars().items() if isinstance(kind, type) and issubclass(kind, MmkdError)}


def to_row(error: MmkdError) -> dict[str, str]:
    """An error as JSON-able data: the nearest class of the tree above, and the sentence."""
    ours = root_cause(error) or error
    kind = next(kind for kind in type(ours).__mro__ if _TREE.get(kind.__name__) is kind)
    return {"kind": kind.__name__, "message": str(ours)}


def from_row(row: Mapping[str, str]) -> MmkdError:
    """The error of a row; a class that this version does not know becomes the base of all."""
    return _TREE.get(row.get("kind", ""), MmkdError)(row.get("message", ""))


def root_cause(error: BaseException | None) -> MmkdError | None:
    """The project's own error at the root of a chain, also through Ray's wrappers; None if it is a bug."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray wraps a task's exception in one that is also an instance of it, with the remote traceback as text.
        cause = getattr(error, "cause", None)
        if isinstance(error, MmkdError) and not isinstance(cause, BaseException):
            return error
        failures = getattr(error, "worker_failures", None)
        nested = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        error = cause if isinstance(cause, BaseException) else nested or error.__cause__ or error.__context__
    return None
