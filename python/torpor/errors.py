"""One exception class for each of Torpor's error codes."""


class Error(Exception):
    """What failed, on what, and what to do, in one sentence. Its subclasses are all there are."""


class NotFoundError(Error):
    """No such agent, model or file."""


class CorruptionError(Error):
    """Bytes on disk are not what was written."""


class IncompatibleError(Error):
    """Intact, but of another model, dtype or format version."""


class InvalidArgumentError(Error):
    """The caller asked for something that can't be."""


class IoError(Error):
    """The operating system refused: disk full, read-only, no permission."""


class BusyError(Error):
    """The agent is being used by another process or thread."""


class ResourceExhaustedError(Error):
    """A budget or limit would be exceeded."""


class CancelledError(Error):
    """Stopped on request."""


class InternalError(Error):
    """A defect of Torpor's own."""
