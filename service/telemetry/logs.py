"""Formats log lines: text for people, JSON for machines (API and worker process).

A record's `fields` are its named values. Must not know who logs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

PLAIN = re.compile(r"[\w./:@+%-]+")
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


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


def set_up_logging(form: str, level: str) -> None:
    """Sends this process's log to stderr.

    `form` is `text` or `json`; `level` one of the logging module's names in lower case.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("uvicorn", "asyncio", "httpx", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns at import of a kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
