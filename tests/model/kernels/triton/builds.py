"""Builds every Triton kernel, as it is launched for Llama-3.1-8B and for the widest heads, without a
GPU; prints what each needs as JSON. A process of its own: where kernels are interpreted none is built.

    python -m tests.model.kernels.triton.builds ARCHITECTURE
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from service.model.kernels.triton import attention, lora, nf4, shapes

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF, FLOAT, INTEGER = "*bf16", "*fp32", "*i32"
ACTIVATIONS = dict.fromkeys(("x", "y", "query", "keys", "values", "out"), HALF)
ACTIVATIONS |= {f"{name}{i}": HALF for name in "aby" for i in range(3)}
QUANTIZED = {"packed": INTEGER, "scales": "*u8", "code": FLOAT, "outer": FLOAT, "offset": FLOAT}
POINTERS = ACTIVATIONS | {f"{name}{i}": kind for name, kind in QUANTIZED.items() for i in range(3)}
POINTERS |= dict.fromkeys(("inner", "weights", "parts"), FLOAT)
POINTERS |= dict.fromkeys(("tiles", "gates", "kv_length", "block_table", "sequence_start"), INTEGER)
POINTERS |= {"sinks": HALF} | {f"ranks{i}": INTEGER for i in range(3)} | {f"bias{i}": HALF for i in range(3)}
FLOATS = {"scale", "softcap"}
ALIGNED = re.compile(r"(^n_in|^n_out|_row\d?|_split|_member|_head|_page|_position)$|^(n_out|b_row|y_row)\d$")


class Launch(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    other: dict[str, str] = {}  # types that differ from the usual  # noqa: RUF012 - never changed


def iterate_launches(generation: int) -> Iterator[Launch]:
    yield from iterate_products()
    for n_in in (4096, 14336):
        chosen = shapes.lora_shape(n_in)
        ranks = {"TOKENS": shapes.LORA_TOKENS, "RANK": shapes.LORA_RANK}
        shrink = ranks | {"K": chosen.inputs, "STAGES": lora.SHRINK_STAGES}
        yield Launch(f"shrink {n_in}", lora.shrink, shrink)
        expand = {"RANK": chosen.ranks, "N": chosen.columns, "SPLITS": chosen.splits, "BIAS": True}
        yield Launch(f"expand {n_in}", lora.expand, ranks | expand)
    yield from iterate_attention("", 4, 128, False, generation)
    yield from iterate_attention("of everything, ", 2, 256, True, generation)


def iterate_products() -> Iterator[Launch]:
    for tokens in shapes.PRODUCT_SHAPES:
        for name, n_out, n_in in (("down", 4096, 14336), ("gate, up", 28672, 4096)):
            chosen = shapes.product_shape(tokens, n_out, n_in)
            constants = {"T": chosen.tokens, "N": chosen.columns, "STAGES": chosen.stages}
            constants |= {"NESTED": True, "DEQUANT": nf4.BFLOAT16}
            out = {} if chosen.splits == 1 else {"y": FLOAT}
            yield Launch(f"product {name}, {tokens}", nf4.multiply_nf4, constants, chosen.warps, out)
    chosen = shapes.product_shape(1, 4096, 4096)
    yield Launch("sum of splits", nf4.sum_splits, {"N": nf4.SUM_COLUMNS, "SPLITS": chosen.splits})


def iterate_attention(
    name: str, groups: int, dim: int, is_limited: bool, generation: int
) -> Iterator[Launch]:
    own: dict[str, Any] = {"DIM": dim, "WIDTH": dim, "WINDOW": is_limited, "CHUNK": is_limited}
    splits = {"SPLITS": shapes.ATTENTION_SPLITS, "FEWEST": shapes.FEWEST_POSITIONS}
    all_of_it = own | {"GROUPS": groups, "BLOCK": shapes.KV_BLOCK, "CAP": is_limited}
    all_of_it |= {"VALUE_DIM": dim, "VALUE_WIDTH": dim}
    decode, prefill = shapes.decode_shape(32, 8, 256), shapes.prefill_shape(groups, dim, generation)
    turns = {"ROWS": 16, "POSITIONS": decode.positions, "STAGES": decode.stages}
    yield Launch(f"{name}decode", attention.attend_splits, all_of_it | splits | turns, decode.warps)
    join = own | splits | {"POSITIONS": decode.positions, "SINKS": is_limited}
    yield Launch(f"{name}join", attention.join_splits, join)
    turns = {"ROWS": prefill.rows, "POSITIONS": prefill.positions, "STAGES": prefill.stages}
    constants = all_of_it | turns | {"SINKS": is_limited}
    yield Launch(f"{name}prefill", attention.attend_chunks, constants, prefill.warps)


def build(launch: Launch, architecture: int) -> dict[str, int]:
    """Registers, bytes of stack a thread and bytes of shared memory."""
    names: list[str] = launch.kernel.arg_names
    types = POINTERS | dict.fromkeys(FLOATS, "fp32") | launch.other
    signature = {name: "constexpr" if name in launch.constants else types.get(name, "i32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and ALIGNED.search(name))
    }
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {**count_resources(built.asm["cubin"]), "shared": built.metadata.shared}


def count_resources(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]) + int(usage["LOCAL"])}


def main() -> None:
    architecture = int(sys.argv[1])
    built = {launch.name: build(launch, architecture) for launch in iterate_launches(architecture // 10)}
    print(json.dumps(built))


if __name__ == "__main__":
    main()
