"""Formats log lines: text for people, JSON for machines (API and worker process).

A record's `fields` are its named values. Must not know who logs.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

log = logging.getLogger("adapterd")
written = logging.getLogger("adapterd.stderr")

PLAIN = re.compile(r"[\w./:@+%-]+")
LINE_ENDS = re.compile(r"[\r\n]+")
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Libraries that say much; those that speak to object stores would also log what they sign requests with
CHATTY = (
    "uvicorn", "asyncio", "httpx", "filelock", "urllib3",
    "fsspec", "s3fs", "gcsfs", "aiobotocore", "botocore", "aiohttp", "google",
)  # fmt: skip

_style = ("text", "info")


def _record_fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _format_time(record: logging.LogRecord) -> str:
    created = datetime.fromtimestamp(record.created, UTC)
    return created.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quote_word(value: Any) -> str:
    """The value as one word: quoted and escaped where it could be mistaken for something else, so
    that nobody can forge a line.
    """
    text = value if isinstance(value, str) else json.dumps(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = _record_fields(record)
        named = "".join(f" {name}={_quote_word(value)}" for name, value in fields.items())
        # It may hold the words of an adapter's files
        message = BREAKS.sub(lambda match: repr(match[0])[1:-1], record.getMessage())
        line = f"{_format_time(record)} {record.levelname.lower():7} {message}{named}"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _format_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps(line | _record_fields(record) | trace, default=str)


class LogLines(io.TextIOBase):
    """A stream whose lines are records of the log: whatever a library writes comes out in its form."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""

    def write(self, text: str, /) -> int:
        *lines, self._rest = LINE_ENDS.split(self._rest + text)
        for line in filter(str.strip, lines):
            written.warning("%s", line)
        return len(text)

    def flush(self) -> None:
        if self._rest:
            self.write("\n")

    def fileno(self) -> int:
        return self.stream.fileno()


def set_up_logging(form: str, level: str) -> None:
    """Sends this process's log to stderr, warnings of libraries included.

    `form` is `text` or `json`; `level` one of the logging module's names in lower case. What a library
    prints goes to stderr, too; where the log is JSON, it becomes lines of it.
    """
    global _style
    _style = form, level
    stream = sys.stderr.stream if isinstance(sys.stderr, LogLines) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns at import of a kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.stdout = sys.stderr = LogLines(stream) if form == "json" else stream
    sys.excepthook = _log_defect if form == "json" else sys.__excepthook__


def current_style() -> tuple[str, str]:
    """The form and the level that this process logs in, for its children."""
    return _style


def tell_failure(reason: str) -> None:
    """Says in one line why the program ends: as it is, or as a record where the log is JSON."""
    line = " ".join(reason.split())
    if _style[0] == "json":
        log.critical("%s", line)
    else:
        print(line, file=sys.stderr)


def _log_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("a defect ends the process", exc_info=(kind, error, trace))
