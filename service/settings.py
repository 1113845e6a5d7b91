"""All settings, frozen, from ADAPTERD_* environment variables and flags of the same names.

API process and worker process; nothing else reads the environment.

A wrong or misspelt variable stops the start with one line that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import SettingsError
from .keys import Key, parse_keys
from .source_urls import check_prefix
from .user_folders import state_folder

PREFIX = "ADAPTERD_"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
FAULT = re.compile(r"^(?:(step|kill|stuck):([1-9]\d*)|(stuck)|(slow_load):(\d+(?:\.\d+)?))$")
HUB_PATTERN = r"^[\w.*-]+/[\w.*-]+$"
HIDDEN = {"api_keys", "admin_keys", "adapters_dir", "base", "forwarded_allow_ips", "sources"}
# As browsers spell them, of pages and of desktop programs and extensions; no pattern of several
ORIGIN = r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s*]+)$"
DEMO_ADAPTERS = Path(__file__).parent / "demo" / "adapters"


def _check_network(text: str) -> str:
    """Raises ValueError unless it is an address, or a network as `10.0.0.0/8`."""
    ip_network(text)
    return text


DEVICES = r"^(auto|(cpu|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*)$"


def _check_devices(text: str) -> str:
    """Raises ValueError where two workers would share a GPU."""
    gpus = [name for name in text.split(",") if name != "cpu"]
    if len(gpus) > len(set(gpus)) or (len(gpus) > 1 and "cuda" in gpus):
        raise ValueError("names a GPU twice; of several each has its number, as cuda:0,cuda:1")
    return text


Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]  # what a base may compute in


class Faults(BaseModel):
    """Faults injected by tests: at a request's Nth token the step raises, the worker dies, or it
    hangs; adapter loads take longer.
    """

    model_config = ConfigDict(frozen=True)
    step: int | None = None
    kill: int | None = None
    stuck: int | None = None
    slow_load: float = 0.0


class Settings(BaseModel):
    """The settings of docs/operating.md's table.

    `_mb` are 10^6 bytes, `_s` seconds. None is `decided by the base or device`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    base: Annotated[str, Field(min_length=1)] = "demo"
    base_id: str | None = None
    quantization: Literal["auto", "nf4", "int8", "none"] = "auto"
    dtype: Literal["auto", Dtype] = "auto"
    device: Annotated[str, Field(pattern=DEVICES), AfterValidator(_check_devices)] = "auto"
    threads: Positive | None = None
    adapters_dir: Path | None = None
    hub: tuple[Annotated[str, Field(pattern=HUB_PATTERN)], ...] = ()
    sources: tuple[Annotated[str, AfterValidator(check_prefix)], ...] = ()
    resolve: Literal["off", "on"] = "off"
    shared: Literal["off", "on"] = "off"
    max_rows: Positive | None = None
    max_context: Positive | None = None
    kv_mb: Positive | None = None
    pool_rank: Positive = 512
    max_rank: Positive = 256
    host_cache_mb: Positive = 4096
    prefill_tokens: Positive | None = None
    queue_limit: Positive = 256
    request_timeout_s: Annotated[float, Field(gt=0)] = 300
    drain_s: Annotated[float, Field(ge=0)] = 30
    max_body_mb: Annotated[float, Field(gt=0)] = 4
    max_upload_mb: Annotated[float, Field(gt=0)] = 2048
    keep_versions: Annotated[int, Field(ge=0)] = 2
    api_keys: tuple[Key, ...] = Field(default=(), repr=False)
    admin_keys: tuple[Key, ...] = Field(default=(), repr=False)
    key_rate: Annotated[float, Field(gt=0)] | None = None
    key_concurrency: Positive | None = None
    key_tokens: Positive | None = None
    cors_origins: tuple[Annotated[str, Field(pattern=ORIGIN)], ...] = ()
    forwarded_allow_ips: tuple[Annotated[str, AfterValidator(_check_network)], ...] = ()
    metrics_adapters: Annotated[int, Field(ge=0)] = 200
    metrics_open: Literal["off", "on"] = "off"
    lora_requests_info: Literal["off", "on"] = "off"
    compile: Literal["off", "auto", "on"] = "auto"
    kernels: Literal["auto", "avx2", "avx512", "avx512_bf16"] = "auto"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    faults: Faults = Faults()

    @property
    def devices(self) -> tuple[str, ...]:
        """Each has a worker of its own."""
        return tuple(self.device.split(","))

    @field_validator("adapters_dir", mode="before")
    @classmethod
    def _check_folder(cls, value: Any) -> Any:
        """Refuses an empty name, which would be the folder where the service was started."""
        if value == "":
            raise ValueError("names no folder")
        return value

    @field_validator("hub", "sources", "cors_origins", "forwarded_allow_ips", mode="before")
    @classmethod
    def _parse_list(cls, value: Any) -> Any:
        return () if value in ("off", "") else _split_list(value)

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: Any) -> Any:
        """The hashes of comma-separated keys or of `@file` with one a line, so that no key can be
        logged.
        """
        return parse_keys(value) if isinstance(value, str) else value

    @field_validator("admin_keys")
    @classmethod
    def _mark_admins(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if any(key.adapters is not None for key in keys):
            raise ValueError("an admin key manages every adapter; adapters= is for API keys")
        return keys

    @field_validator("faults", mode="before")
    @classmethod
    def _parse_faults(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        faults: dict[str, float | int] = {}
        for word in _split_list(value):
            faults |= _parse_fault(word)
        return faults

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.max_rank > self.pool_rank:
            raise ValueError(f"max_rank {self.max_rank} is over pool_rank {self.pool_rank}")
        return self

    @property
    def keyed(self) -> bool:
        return bool(self.api_keys or self.admin_keys)

    @property
    def adapters(self) -> Path:
        """The root of the adapter folders."""
        if self.adapters_dir is not None:
            return self.adapters_dir
        return DEMO_ADAPTERS if self.base == "demo" else Path("adapters")

    @property
    def state(self) -> Path:
        """The folder of registrations and uploads: the adapters directory; for the shipped adapters, which
        lie in the code, a folder of the user's. Raises SettingsError where the user has none.
        """
        if self.adapters_dir is None and self.base == "demo":
            return state_folder() / "demo"
        return self.adapters

    def public_values(self) -> dict[str, Any]:
        """The values that `/info` shows: no secret, no path of the host."""
        shown = self.model_dump(mode="json", exclude=HIDDEN)
        return shown | {"keys": self.keyed}


def _split_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _parse_fault(word: str) -> dict[str, float | int]:
    match = FAULT.match(word)
    if match is None:
        raise ValueError(f"{word!r} is not step:N, kill:N, stuck:N, stuck or slow_load:S")
    kind, number, stuck, slow, seconds = match.groups()
    if kind:
        return {kind: int(number)}
    return {"stuck": 1} if stuck else {slow: float(seconds)}


def read_settings(environment: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Settings:
    """The settings of this environment, with flags over variables.

    Raises SettingsError, one line naming the variable.
    """
    variables = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
    values = {name.removeprefix(PREFIX).lower(): text for name, text in variables.items()}
    if environment.get("WEB_CONCURRENCY", "1") not in ("", "1"):
        raise SettingsError(
            "WEB_CONCURRENCY: more than one server process is not supported: "
            "one API process, one worker per device"
        )
    try:
        settings = Settings.model_validate(values | dict(flags or {}))
    except ValidationError as error:
        raise SettingsError(_first_line(error)) from None
    _check_locations(settings)
    return settings


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return f"{PREFIX}MAX_RANK: {first['msg'].removeprefix('Value error, ')}"
    name = PREFIX + str(first["loc"][0]).upper()
    if first["type"] == "extra_forbidden":
        return f"{name}: no such setting"
    message = first["msg"].removeprefix("Value error, ")
    is_secret = name.endswith(("_KEYS", "_SOURCES"))  # a URL may hold a password
    given = "" if is_secret else f" (got {str(first['input'])[:80]!r})"
    return f"{name}: {message}{given}"


def _check_locations(settings: Settings) -> None:
    """Checks the settings that name a location: the base, the adapters' folder and the address."""
    if not _names_base(settings.base):
        raise SettingsError(
            f"{PREFIX}BASE: {settings.base!r} is no folder, no .gguf file, no hub id and not 'demo'"
        )
    if settings.adapters.exists() and not settings.adapters.is_dir():
        raise SettingsError(f"{PREFIX}ADAPTERS_DIR: {str(settings.adapters)!r} is no folder")
    if not settings.keyed and settings.host not in ("127.0.0.1", "localhost", "::1"):
        raise SettingsError(
            f"{PREFIX}HOST: {settings.host} is not loopback; "
            f"set {PREFIX}API_KEYS or {PREFIX}ADMIN_KEYS to listen there"
        )


def _names_base(base: str) -> bool:
    if base == "demo" or Path(base).exists():
        return True
    return not base.endswith(".gguf") and HUB_ID.match(base) is not None
