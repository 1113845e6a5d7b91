"""A GPU that is not there: CPU tensors that say `cuda`, and are as strict about it.

They refuse to meet tensors of the CPU. What runs on a side stream happens as late as CUDA allows:
only when somebody waits for it. So does a copy to the host that is not waited for, and what is copied
from it must stay as it was until then; `GPU.waits` counts how often the host has waited. A graph
records operations without Python between them, replays them on the same memory, and refuses what
would wait for the device. What loading took is not free before torch gives it back. Attention that
may be cuDNN's, torch's first choice, is refused: it plans anew for each length. Where
Triton's kernels would be, torch does what they do.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from service.core.base_info import BLOCK_TOKENS
from service.model import gpu_kernels, kv, loading
from service.model.kernels.triton.shapes import LoraMember, LoraTiles
from service.model.step_layout import StepLayout
from service.settings import Settings

AWAITED = {
    *("aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal"),
    *("aten.masked_select", "aten._unique2", "aten.unique_consecutive", "aten.bincount"),
}
MEMORY = 1 << 28
CROSSING = {"aten.copy_", "aten.to", "aten._to_copy", "getitem", "setitem"}
Work = Callable[[], Any]


class Stream:
    """Work that waits until somebody waits for it; `now` runs at once."""

    def __init__(self, now: bool = False) -> None:
        self.now = now
        self.queue: list[Work] = []

    def finish(self, count: int | None = None) -> None:
        queue, self.queue = self.queue[:count], self.queue[len(self.queue) if count is None else count :]
        for work in queue:
            work()

    def wait_stream(self, other: Stream) -> None:
        other.finish()


class Event:
    stream: Stream | None = None  # it was not recorded yet

    def record(self) -> None:
        self.stream, self.count = GPU.stream, len(GPU.stream.queue)
        self.issued = GPU.issued

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.count)

    def synchronize(self) -> None:
        self.wait()
        if self.stream is not None:
            GPU.waits += GPU.land(self.issued)


class Graph:
    """Operations in their order, each with the memory that it reads and writes.

    Holds the pool that it was recorded in.
    """

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.pool: object = None

    def __del__(self) -> None:
        if self.pool is not None:
            GPU.held[self.pool] -= 1

    def replay(self) -> None:
        for work in self.work:
            work()


class GPU:
    """Its state; one at a time."""

    default = Stream(now=True)
    stream = default
    graph: Graph | None = None
    free = 0
    held: ClassVar[Counter[object]] = Counter()  # pools of memory, by how many recordings hold them
    filling: ClassVar[set[object]] = set()
    crossing: ClassVar[list[Callable[[], bool]]] = []  # copies to the host and from it that are under way
    issued = 0  # such copies so far
    waits = 0

    @classmethod
    def issue(cls, copy: Callable[[], bool]) -> None:
        """`copy` says whether the host gets anything by it."""
        cls.crossing.append(copy)
        cls.issued += 1

    @classmethod
    def land(cls, until: int | None = None) -> bool:
        """Ends the copies that had been issued until then, or all; whether the host has waited."""
        count = len(cls.crossing) - (0 if until is None else cls.issued - until)
        landing, cls.crossing = cls.crossing[: max(count, 0)], cls.crossing[max(count, 0) :]
        return sum(copy() for copy in landing) > 0


class PretendedTensor(torch.Tensor):
    """`numbers` are its own, on the CPU."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> PretendedTensor:
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("cuda"),
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(function, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return run(operator.getitem, (self, index), {})

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        made: torch.Tensor = torch.ops.aten.copy_(self, source, non_blocking)
        return made

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        made: torch.Tensor = torch.ops.aten.contiguous(self, memory_format=memory_format)
        return made

    def nonzero(self) -> torch.Tensor:  # type: ignore[override]
        made: torch.Tensor = torch.ops.aten.nonzero(self)
        return made

    def __invert__(self) -> torch.Tensor:
        made: torch.Tensor = torch.ops.aten.bitwise_not(self)
        return made

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __float__(self) -> float:
        return float(self.to("cpu"))

    def __int__(self) -> int:
        return int(self.to("cpu"))

    def __bool__(self) -> bool:
        return bool(self.to("cpu"))

    def __setitem__(self, index: Any, value: Any) -> None:
        run(operator.setitem, (self, index, value), {})


class Pretence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends what names `cuda` there; leaves all else alone."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    there = [value for value in flat if isinstance(value, PretendedTensor)]
    devices = [value for value in flat if isinstance(value, torch.device)]
    on = devices[0].type if devices else "cuda" if there else "cpu"
    name = str(getattr(function, "overloadpacket", function.__name__))
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if name in ("aten.pin_memory", "aten._pin_memory"):
        return args[0].clone()
    if not there and on == "cpu":
        return function(*args, **kwargs)
    here = [value for value in flat if _is_on_cpu(value)]
    _check_permitted(name, args, bool(there), bool(here), on)
    if there and (on == "cpu" or _awaited(name, args)):
        GPU.land()
        GPU.waits += 1
    if name == "aten.copy_" and here:
        return _cross(*args, *kwargs.values())
    outer = {id(tensor.numbers): tensor for tensor in there}
    inner_args, inner_kwargs = tree_map(_inside, (args, kwargs))
    out = _done(function, inner_args, inner_kwargs)
    if on == "cpu":
        return out
    return tree_map(lambda value: _outside(value, outer), out)


def _cross(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copies between host and device."""
    if not non_blocking:
        GPU.land()
        GPU.waits += 1
    if isinstance(target, PretendedTensor):
        _note_sending(source)
        _done(torch.ops.aten.copy_.default, (target.numbers, source), {})
        return target
    made: torch.Tensor = _inside(source).clone()
    target.fill_(-77)  # what the host would read too early

    @torch.inference_mode()
    def arrive() -> bool:
        target.copy_(made)
        return True

    GPU.issue(arrive)
    if not non_blocking:
        GPU.land()
    return target


def _note_sending(source: torch.Tensor) -> None:
    """The host's memory is read as late as can be."""
    before = source.clone()

    def look() -> bool:
        if not torch.equal(source, before):
            raise RuntimeError("what was being copied to the device was written over")
        return False

    GPU.issue(look)


def _is_on_cpu(value: Any) -> bool:
    """Whether it is a tensor of the CPU; one of no dimensions may go anywhere."""
    return isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor) and value.dim() > 0


def _check_permitted(name: str, args: Any, there: bool, here: bool, on: str) -> None:
    """Raises what a GPU would; `there` and `here`: tensors of it and of the CPU take part."""
    if there and here and name not in CROSSING:
        raise RuntimeError(f"{name}: tensors of cuda and of cpu in one operation")
    if name == "aten.scaled_dot_product_attention" and torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        raise RuntimeError("cuDNN would plan this attention anew for each length")
    if GPU.graph is not None and (here or on == "cpu" or _awaited(name, args)):
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")


def _outside(value: Any, outer: dict[int, PretendedTensor]) -> Any:
    if id(value) in outer:
        return outer[id(value)]
    return PretendedTensor(value) if isinstance(value, torch.Tensor) else value


def _awaited(name: str, args: Any) -> bool:
    """Whether the host waits for the device here; to index by truth is to count what is true."""
    index = tree_flatten(args[1])[0] if name in ("getitem", "setitem") else []
    return name in AWAITED or any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in index)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.numbers if isinstance(value, PretendedTensor) else value


def _done(function: Any, args: Any, kwargs: Any) -> Any:
    """Runs it now, later or at every replay, always into the same memory."""
    if GPU.graph is None and GPU.stream.now:
        return function(*args, **kwargs)
    work = GPU.stream.queue if GPU.graph is None else GPU.graph.work
    if function in CHANGING or (hasattr(function, "_schema") and function._schema.is_mutable):
        work.append(lambda: function(*args, **kwargs))
        return args[0]
    out = function(*args, **kwargs)
    fresh = _fresh_tensors(out, (args, kwargs))
    if fresh:
        work.append(lambda: _into(fresh, function(*args, **kwargs)))
    for tensor in fresh:
        # It has not been computed yet
        tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 0)
    return out


def _fresh_tensors(out: Any, inputs: Any) -> list[torch.Tensor]:
    """The results that lie in memory of their own."""
    known = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(inputs)}
    return [tensor for tensor in _tensors_of(out) if tensor.untyped_storage().data_ptr() not in known]


def _tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _into(memory: list[torch.Tensor], made: Any) -> None:
    for old, new in zip(memory, tree_flatten(made)[0], strict=True):
        old.copy_(new)


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    before, GPU.stream = GPU.stream, stream
    yield
    GPU.stream = before


@contextmanager
def _recording(graph: Graph, pool: object, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    assert not graph.work
    before, GPU.stream, GPU.graph = GPU.stream, Stream(), graph
    GPU.filling.add(pool)
    GPU.held[pool] += 1
    try:
        yield
        GPU.stream, graph.pool = before, pool
        GPU.filling.remove(pool)
    except RuntimeError:  # it stays on its stream, and the pool is left filling and held, as torch 2.11 does
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
    finally:
        GPU.graph = None


def _to(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's own looks for the device before anybody can stand in for it."""

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, non_blocking, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or (device.type == "cpu" and self.device.type == "cpu"):
            return plain(self, *args, **kwargs)
        if device.type == self.device.type and dtype in (None, self.dtype):
            return self
        if self.device.type == "cpu":
            _note_sending(self)
            GPU.waits += not non_blocking
        made: torch.Tensor = run(
            torch.ops.aten._to_copy.default, (self,), {"dtype": dtype or self.dtype, "device": device}
        )
        return made

    return to


def _set(stream: Stream) -> None:
    GPU.stream = stream


def _end(device: int, pool: object) -> None:
    if pool not in GPU.filling:
        raise RuntimeError("not currently recording to this pool")
    GPU.filling.remove(pool)


def _release(device: int, pool: object) -> None:
    GPU.held[pool] -= 1


def _empty_cache() -> None:
    GPU.free = MEMORY


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "mem_get_info": lambda device: (GPU.free, MEMORY),
    "empty_cache": _empty_cache,
    "Stream": Stream,
    "Event": Event,
    "stream": _on,
    "set_device": lambda index: None,
    "set_stream": _set,
    "current_device": lambda: 0,
    "current_stream": lambda: GPU.stream,
    "CUDAGraph": Graph,
    "graph": _recording,
    "graph_pool_handle": object,
}
PRIVATE: dict[str, Any] = {
    "_host_emptyCache": lambda: None,
    "_cuda_endAllocateToPool": _end,
    "_cuda_releasePool": _release,
}


def add_tiles(x: torch.Tensor, member: LoraMember, layout: LoraTiles) -> None:
    run(_add_tiles, (member, x, layout), {})


def _add_tiles(member: LoraMember, x: torch.Tensor, layout: LoraTiles) -> None:
    """What the kernel makes of tiles of one token each; of ranks that it was not made for, nothing."""
    y, a, b, ranks, bias = member
    token, tokens, low, rank = layout.tiles.T
    rank = torch.minimum(rank, ranks[low])
    is_met = ((tokens > 0) & (rank > 0) & (rank <= layout.most_rank))[:, None]
    rows = torch.arange(len(a))
    is_own = (rows >= low[:, None]) & (rows < (low + rank)[:, None]) & is_met
    gate = b[layout.gates.clamp(min=0)] * (is_met & (layout.gates >= 0)[:, None])
    plain = y[token] if bias is None else y[token] - bias
    y[token] += plain * gate + (x[token] @ a.T * is_own) @ b


def attend_singles(attention: kv.BlockAttention, query: torch.Tensor, layout: StepLayout) -> Any:
    positions = layout.positions[: layout.singles]
    return run(_attend_singles, (attention, query, positions, layout.block_table), {})


def _attend_singles(
    attention: kv.BlockAttention, query: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """As the kernel, which reads no more of a sequence's row of the table than the sequence has."""
    held = positions[:, None] // BLOCK_TOKENS + 1
    own = table[:, : int(held.max())]
    own = torch.where(torch.arange(own.shape[1]) < held, own, own[:, :1])
    every = (positions,) * 4
    return attention._attend_singles(query, StepLayout(*every, own, positions, len(positions)))


CHANGING = {operator.setitem, _add_tiles}  # functions that no schema says so of
KERNELS: dict[str, Any] = {
    "explain_absence": lambda device: None,
    "add_tiles": add_tiles,
    "attend_singles": attend_singles,
}


@contextmanager
def gpu() -> Iterator[type[GPU]]:
    """While it lasts, `cuda` is a device of this machine, and a base that is to be loaded there
    comes to it by way of the CPU.
    """
    GPU.stream, GPU.graph, GPU.free = GPU.default, None, MEMORY >> 10
    GPU.held, GPU.filling = Counter(), set()
    GPU.crossing, GPU.issued, GPU.waits = [], 0, 0
    torch.backends.cuda.enable_cudnn_sdp(True)
    with pytest.MonkeyPatch.context() as patch, Pretence():  # type: ignore[no-untyped-call]
        for name, stand_in in CUDA.items():
            patch.setattr(torch.cuda, name, stand_in)
        for name, stand_in in PRIVATE.items():
            patch.setattr(torch._C, name, stand_in, raising=False)
        for name, stand_in in KERNELS.items():
            patch.setattr(gpu_kernels, name, stand_in)
        patch.setattr(torch, "tensor", _tensor(torch.tensor))
        patch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
        patch.setattr(loading, "load_base", _load(loading.load_base))
        # Storages that are not there have no addresses
        patch.setattr(loading, "resident_bytes", lambda model: {})
        yield GPU


def _tensor(plain: Any) -> Any:
    return lambda data, device=None, **other: (
        plain(data, **other) if device is None else plain(data, **other).to(device)
    )


def _load(plain: Any) -> Any:
    def load(folder: Path, settings: Settings, progress: loading.Progress) -> Any:
        with _disable_current_modes():
            model = plain(folder, settings.model_copy(update={"device": "cpu"}), progress)
        return moved(model)

    return load


def moved(model: Any) -> Any:
    """The model on the pretended GPU."""
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None and not isinstance(tensor, PretendedTensor):
                    there = PretendedTensor(tensor.detach())
                    kept[name] = (
                        torch.nn.Parameter(there, requires_grad=False)
                        if kept is module._parameters
                        else there
                    )
    model.tie_weights()
    return model
