"""What can go wrong: SdcppError and one class per status of the engine."""

import os


class SdcppError(Exception):
    """Anything that the package raises on purpose; the message is one sentence for the user."""


class BadArgument(SdcppError, ValueError):
    """The caller can mend it: a number out of range, an unknown name, a closed context."""


class BadFile(SdcppError):
    """A file is damaged, or not what it claims to be."""


class Unsupported(SdcppError):
    """A file or a wish is sound, but nothing that this version knows."""


class OutOfMemory(SdcppError, MemoryError):
    """The model or the picture needs more memory than there is."""


class Cancelled(SdcppError):
    """A callback asked to stop."""


class Busy(SdcppError):
    """The context is painting already, for instance when on_step paints."""


class Io(SdcppError, OSError):
    """The operating system refused: no such file, no permission, no space."""


class Internal(SdcppError):
    """A mistake of ours: please report it."""


# In the order of sd_status in sdcpp.h, which begins with SD_OK.
BY_STATUS: tuple[type[SdcppError], ...] = (
    Internal,
    BadArgument,
    BadFile,
    Unsupported,
    OutOfMemory,
    Cancelled,
    Busy,
    Io,
    Internal,
)


def from_status(status: int, message: str) -> SdcppError:
    """The exception for a status of the engine; one that is not known counts as internal."""
    known = 0 < status < len(BY_STATUS)
    kind = BY_STATUS[status] if known else Internal
    return kind(message or f"the engine gave status {status} without a message; please report it")


def from_os_error(path: object, error: OSError) -> Io:
    """The exception for an operating system's refusal about a file."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return Io(f"{path}: {reason}")
