"""What can go wrong, by what the caller does next.

::

    NogradError
    ├── ConfigError            fix the configuration; the message names key, value and file
    │   ├── ModelFileError
    │   └── MissingExtra       an optional library is not installed; the message names the extra
    ├── BrokerUnavailable      Redis cannot be reached; try again
    ├── ResultTimeout          the job is still on its way; ask again later
    ├── UnknownModel           no such model; the message lists the known ones
    ├── BackfillError          a backfill cannot go on; what is committed stays, and it can be resumed
    │   ├── SourceError        the inputs cannot be read; the message names the file and the place in it
    │   ├── PlanChanged        inputs, model or parameters are not those of the plan; the message lists what changed
    │   ├── OutputError        the output folder refuses what a commit needs
    │   │   └── OutputFull     no space left there; make room and resume
    │   ├── NotFinished        chunks are still missing
    │   ├── BudgetExceeded     more rows failed than may; mend the cause, or raise the budget, and resume
    │   ├── BackfillCancelled  somebody cancelled it
    │   └── VerificationFailed committed output is not what its records say
    └── JobError               stored as the outcome of one job
        ├── InvalidInput       this input will never work: fix it, do not retry
        ├── ModelFailed        the model raised on this input
        ├── OutputMismatch     the model broke its contract on this input (one output for each)
        ├── NonFiniteOutput    the prediction holds NaN or infinity
        ├── DeadlinePassed     the job waited longer than it was allowed to
        ├── JobCancelled       somebody revoked it
        ├── WorkerDied         each worker that ran the job died over it; it is in the dead letters
        └── Overloaded         out of memory even alone; retried by the worker, with backoff

Celery rebuilds an exception from its class and ``args``, in a process that may hold another version of this module.
So each error takes exactly one argument, its message, and what it means (``code``, ``retryable``) stands on the class.
"""

from __future__ import annotations

from typing import ClassVar


class NogradError(Exception):
    """Base of all errors of nograd."""

    #: stable name for programs (``--json`` output, error rows); never reused for another meaning
    code: ClassVar[str] = "error"
    #: whether the same job may succeed if it is run again unchanged
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """The message, without the class name."""
        return str(self.args[0]) if self.args else ""


class ConfigError(NogradError):
    """A setting is missing or wrong. The message names the key, the value and where it stands."""

    code = "config"


class ModelFileError(ConfigError):
    """The model file is wrong, or something it points to is missing or refused."""

    code = "model_file"


class MissingExtra(ConfigError):
    """A library that only some uses need is not installed."""

    code = "missing_extra"


class BrokerUnavailable(NogradError):
    """Redis did not answer, or not any more.

    A connection that breaks while jobs are on their way leaves open which of them were accepted.
    """

    code = "broker_unavailable"
    retryable = True


class ResultTimeout(NogradError, TimeoutError):
    """The job has no outcome yet. It goes on; ask again."""

    code = "result_timeout"
    retryable = True


class UnknownModel(NogradError):
    """No model of that name is in the model file or was ever registered by a worker."""

    code = "unknown_model"


class BackfillError(NogradError):
    """A backfill cannot go on. What is committed stays; once the cause is mended, resume it."""

    code = "backfill"


class SourceError(BackfillError):
    """The inputs cannot be listed, or one of them cannot be read. The message names it."""

    code = "source"


class PlanChanged(BackfillError):
    """The inputs, the model or the parameters are not those the plan was made for; the message says what changed."""

    code = "plan_changed"


class OutputError(BackfillError):
    """The output folder cannot be written, or lacks what a commit needs."""

    code = "output"


class OutputFull(OutputError):
    """No space is left for the output. Nothing of the chunk was committed; make room and resume."""

    code = "output_full"
    retryable = True


class NotFinished(BackfillError):
    """Chunks are still missing; the message says how many."""

    code = "not_finished"
    retryable = True


class BudgetExceeded(BackfillError):
    """More rows failed than the error budget allows; the message says how many."""

    code = "budget_exceeded"


class BackfillCancelled(BackfillError):
    """Somebody cancelled the backfill. What is committed stays, and it can be resumed."""

    code = "backfill_cancelled"


class VerificationFailed(BackfillError):
    """The committed output is not what its records say; the message lists the differences."""

    code = "verification_failed"


class JobError(NogradError):
    """The outcome of one job that did not succeed."""

    code = "job_failed"


class InvalidInput(JobError):
    """The input is not what the model takes. Running it again cannot help."""

    code = "invalid_input"


class ModelFailed(JobError):
    """The model raised on this input, alone in its batch."""

    code = "model_failed"


class OutputMismatch(JobError):
    """The model did not return exactly one output for this input, alone in its batch."""

    code = "output_mismatch"


class NonFiniteOutput(JobError):
    """The prediction holds NaN or infinity, and the model file does not let such out (``nonfinite_output``)."""

    code = "nonfinite_output"


class DeadlinePassed(JobError):
    """The job waited longer than its ``timeout_s`` before the device was free for it."""

    code = "deadline_passed"


class JobCancelled(JobError):
    """The job was revoked or had expired before it ran."""

    code = "cancelled"


class WorkerDied(JobError):
    """Every worker that had the job on its device, or in preparation, died. The job is in the dead letters."""

    code = "worker_died"


class Overloaded(JobError):
    """The device was out of memory, also for this input alone; the worker retries the job with backoff."""

    code = "overloaded"
    retryable = True
