"""The six errors, named for what the caller must do.

A backend raises these and nothing else.  Callers branch on the class, never on the message; the
provider's own exception is the `__cause__`.
"""


class Error(Exception):
    """Something a backend could not do.  Only its six subclasses are raised.

    The message is one sentence for an operator: it names the thing and says what to do.  It never
    carries a secret, a URL query or object content.

    `backend` names the backend, such as ``s3`` or ``clamav``.  `reason` is a machine-readable
    detail: on `Unsupported` the reason code of the `Unscannable` verdict it leads to (see
    `bucketward.model.Reason`), on `Denied` the missing permission, on
    `Unavailable` ``loading`` where nothing is wrong and time helps.  `retry_after` is the number of
    seconds the provider asked us to wait, where it did.
    """

    def __init__(
        self,
        message: str,
        *,
        backend: str = "",
        reason: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.backend = backend
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.backend}: {self.message}" if self.backend else self.message


class NotFound(Error):  # noqa: N818 - named for what happened, not for being an exception
    """It is gone: acknowledge, there is nothing left to do."""


class Changed(Error):  # noqa: N818
    """It is not what we looked at: enqueue what is there now, act on nothing."""


class Denied(Error):  # noqa: N818
    """We are not allowed to: record verdict `Error` with the missing permission in `reason`."""


class Unavailable(Error):  # noqa: N818
    """Not now: keep the message or give it back, and try again later."""


class Unsupported(Error):  # noqa: N818
    """This backend cannot do that, now or later."""


class ConfigError(Error):
    """An operator must act before we can start.  Raised at start-up and by validation only."""
