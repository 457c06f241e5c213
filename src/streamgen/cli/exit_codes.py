"""One exit code per family of errors, so that a script can tell a wrong option from a full queue."""

from __future__ import annotations

from streamgen.errors import (
    AdmissionError,
    ConfigError,
    EngineFailed,
    GenerationError,
    LoadError,
    RequestError,
    StreamgenError,
)

OK = 0
UNEXPECTED = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
BROKEN_PIPE = 141  # 128 + SIGPIPE

FAMILIES: tuple[tuple[type[StreamgenError], int], ...] = (
    (ConfigError, USAGE),
    (LoadError, 3),
    (RequestError, 4),
    (AdmissionError, 5),
    (GenerationError, 6),
    (EngineFailed, 7),
)

HELP = """\
exit codes:
  0    success
  1    unexpected error
  2    wrong usage, or an option that cannot be used (ConfigError)
  3    the model could not be opened (LoadError)
  4    the request cannot be run (RequestError)
  5    the engine did not take the request (AdmissionError)
  6    the request failed while it ran (GenerationError)
  7    the engine failed (EngineFailed)
  130  interrupted
  141  whoever read the output left
"""


def exit_code(error: Exception) -> int:
    """The exit code of an error's family; UNEXPECTED where it has none."""
    return next((code for family, code in FAMILIES if isinstance(error, family)), UNEXPECTED)
