"""Domain errors. A class's docstring is its default message; `api/errors.py` maps each class to a status."""

from typing import ClassVar


class LoradError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str | None = None, *, param: str | None = None, code: str | None = None) -> None:
        """`param` names the field at fault; `code` narrows the class's stable error code."""
        super().__init__(message or type(self).__doc__)
        self.param = param
        self.error_code = code or type(self).code

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidRequest(LoradError):
    """The request is not valid."""

    code = "invalid_value"


class InvalidTrainingFile(InvalidRequest):
    """The file cannot be used to train."""

    code = "invalid_training_file"


class IncompatibleAdapter(InvalidRequest):
    """The adapter does not fit this base model."""

    code = "incompatible_adapter"


class UnknownTarget(InvalidRequest):
    """No module of the base model matches the target."""

    code = "unknown_target"


class UnsupportedArchitecture(InvalidRequest):
    """This model architecture is not supported."""

    code = "unsupported_architecture"


class PayloadTooLarge(LoradError):
    """The request is larger than allowed."""

    code = "payload_too_large"


class UnsupportedMediaType(LoradError):
    """The content type is not supported."""

    code = "unsupported_media_type"


class Unauthenticated(LoradError):
    """An API key is needed: send 'Authorization: Bearer lorad_...'."""

    code = "invalid_api_key"


class Forbidden(LoradError):
    """This API key may not do that."""

    code = "insufficient_scope"


class NotFound(LoradError):
    """There is no such object."""

    code = "not_found"


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


class StateConflict(LoradError):
    """The object's state forbids this."""

    code = "state_conflict"


class CancelRequested(StateConflict):
    """Cancellation was asked for first; nothing may be published."""

    code = "cancel_requested"


class AdapterCorrupt(StateConflict):
    """A stored file of this adapter no longer matches its recorded checksum."""

    code = "adapter_corrupt"


class IdempotencyMismatch(LoradError):
    """This Idempotency-Key was used before with another request."""

    code = "idempotency_mismatch"


class RequestInFlight(LoradError):
    """A request with this Idempotency-Key is still being answered."""

    code = "idempotency_in_flight"


class Unavailable(LoradError):
    """The service cannot do this right now; try again."""

    code = "unavailable"


class QueueFull(LoradError):
    """Too many requests are waiting; try again later."""

    code = "queue_full"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, code: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class RateLimited(LoradError):
    """Too many requests in a minute; try again later."""

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(LoradError):
    """The answer was not ready before the deadline."""

    code = "deadline_exceeded"


class GenerationTimeout(DeadlineExceeded):
    """The answer was not ready before the deadline."""


class StorageFull(LoradError):
    """The service's disk is full; nothing of this request was kept."""

    code = "insufficient_storage"


class OwnershipLost(LoradError):
    """Another trainer owns this job now; nothing may be published."""

    code = "ownership_lost"


class TrainingFailed(LoradError):
    """Training failed, and would fail again."""

    code = "training_failed"


class StartupError(LoradError):
    """The program cannot start."""

    code = "startup_error"


class SettingsError(StartupError):
    """A setting has a value that is not allowed."""

    code = "invalid_setting"


class SchemaTooNew(StartupError):
    """The database was written by a newer lorad than this one."""

    code = "schema_too_new"
