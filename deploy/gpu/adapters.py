"""Grouped LoRA on the device: right, the same to the bit in any company, and how fast beside the
masked dense products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from service.model.kernels.triton import lora, oracles
from service.model.kernels.triton.shapes import LORA_TOKENS, LoraMember, LoraShape, LoraTiles, lora_shape

from .measure import DEVICE, DRY, Call, Report, gap, random, ring, took
from .products import GROUPS, Group

Tile = tuple[int, int, int, int]
RANKS = (8, 16, 64)
ERROR = 5e-3
# Inputs at a time, inputs of a split, columns and ranks at a time that are tried
VARIANTS = (
    [(64, 64, 64, 16)]
    if DRY
    else [(128, 512, 256, 16), (128, 512, 256, 64), (128, 512, 512, 16), (128, 1024, 256, 16)]
)


def make_layout(tiles: Sequence[Tile], gates: Sequence[int] = (), most_rank: int = 0) -> LoraTiles:
    """Without gates none has one; without `most_rank` it is that of the tiles."""
    rows = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    weights = torch.rand(len(tiles), LORA_TOKENS, device=DEVICE) + 0.5
    own = torch.tensor(gates or [-1] * len(tiles), dtype=torch.int32, device=DEVICE)
    return LoraTiles(rows, weights, own, most_rank or max(rank for *_, rank in tiles))


def make_members(group: Group, tokens: int, rows: int) -> list[LoraMember]:
    """Of layers that all adapters have all their ranks in."""
    ranks = torch.full((rows,), rows, dtype=torch.int32, device=DEVICE)
    return [
        LoraMember(random(tokens, n), random(rows, group.n_in) / 64, random(rows, n) / 64, ranks)
        for n in group.outputs
    ]


def each_own(tokens: int, ranks: Sequence[int]) -> list[Tile]:
    """A tile a token, of ranks that take turns."""
    tiles: list[Tile] = []
    low = 0
    for i in range(tokens):
        tiles.append((i, 1, low, ranks[i % len(ranks)]))
        low += ranks[i % len(ranks)]
    return tiles


def shared(tokens: int, rank: int) -> list[Tile]:
    """All tokens' one adapter."""
    return [(i, min(LORA_TOKENS, tokens - i), 0, rank) for i in range(0, tokens, LORA_TOKENS)]


def compile_all(part: int, of: int) -> None:
    for i, shape in enumerate(shapes_of(4096)):
        if i % of == part:
            _run_small(shape, 4096)
    if part == of - 1:
        _run_small(lora_shape(14336), 14336)


def _run_small(shape: LoraShape, n_in: int) -> None:
    group = Group("compiled", (256,), n_in)
    lora.add_adapters(random(8, n_in), make_members(group, 8, 128), make_layout(each_own(8, (16,))), shape)


def shapes_of(n_in: int) -> list[LoraShape]:
    return [LoraShape(each[0], min(16, -(-n_in // each[1])), *each[2:]) for each in VARIANTS]


def check_adapters(report: Report) -> None:
    """Mixed ranks, several adapters of a token, a run of tokens, unused tiles, tokens of the base, and
    two gates.
    """
    tiles: list[Tile] = [(0, 3, 0, 8), (5, 1, 8, 64), (6, 16, 72, 16), (0, 0, 0, 0)]
    tiles += [(23, 1, 88, 8), (23, 1, 0, 8), (24, 1, 0, 0), (25, 1, 96, 24)]
    for group in GROUPS:
        x, layout = random(27, group.n_in), make_layout(tiles, [-1, 127, 126, *[-1] * (len(tiles) - 3)])
        members = make_members(group, 27, 128)
        before = [member._replace(y=member.y.clone()) for member in members]
        lora.add_adapters(x, members, layout)
        error = max(
            gap(after.y, oracles.add_adapters(x, old, layout))
            for after, old in zip(members, before, strict=True)
        )
        report.expect(error < ERROR, f"LoRA {group.name}: error {error:.2g}")
        base = all(
            torch.equal(after.y[rows], old.y[rows])
            for after, old in zip(members, before, strict=True)
            for rows in (slice(3, 5), slice(22, 23), slice(24, 25), slice(26, 27))
        )
        report.expect(base, f"LoRA {group.name}: tokens of the base are touched")
        same = all(_is_same(x, members, before, layout, i) for i in (0, 1, 2))
        report.expect(same, f"LoRA {group.name}: bits depend on the company")
        report.add("LoRA", f"{group.name}, right", error=error, base_untouched=base, same_in_company=same)


def _is_same(
    x: Tensor, members: list[LoraMember], before: list[LoraMember], layout: LoraTiles, tile: int
) -> bool:
    """Whether the first token of a tile comes out as alone."""
    start, _, low, rank = layout.tiles[tile].tolist()
    row = slice(start, start + 1)
    lonely = [member._replace(y=member.y[row].clone()) for member in before]
    weights = torch.ones(1, LORA_TOKENS, device=DEVICE) * layout.weights[tile, 0]
    own = make_layout([(0, 1, low, rank)], [int(layout.gates[tile])])._replace(weights=weights)
    lora.add_adapters(x[row], lonely, own)
    return all(torch.equal(one.y, many.y[row]) for one, many in zip(lonely, members, strict=True))


def time_adapters(report: Report, bandwidth: float) -> None:
    cases = [("each its own, rank 16", 32, each_own(32, (16,))), ("one adapter", 32, shared(32, 16))]
    cases += [("each its own, mixed", 64, each_own(64, RANKS))]
    for group in GROUPS:
        for name, tokens, tiles in [("dry", 3, each_own(3, (8,)))] if DRY else cases:
            _time_case(report, group, f"{group.name}, {tokens} tokens, {name}", tokens, tiles, bandwidth)


def _time_case(
    report: Report, group: Group, name: str, tokens: int, tiles: list[Tile], bandwidth: float
) -> None:
    used = max(low + rank for _, _, low, rank in tiles)
    size = 2 * used * (group.n_in * len(group.outputs) + sum(group.outputs))
    x, layout = random(tokens, group.n_in), make_layout(tiles)
    copies = [make_members(group, tokens, used) for _ in range(ring(size))]
    times = {
        f"K{shape.inputs} splits {shape.splits} N{shape.columns} R{shape.ranks}": took(
            [partial(lora.add_adapters, x, members, layout, shape) for members in copies]
        )
        for shape in shapes_of(group.n_in)
    }
    best = min(times, key=lambda shape: times[shape])
    figures = {"us": times[best], "own_us": next(iter(times.values()))}
    figures |= {"of_floor": size / bandwidth / times[best], "recorded_us": _time_recorded(x, copies, layout)}
    report.add("LoRA", name, **figures, masked_us=_time_masked(x, copies, tiles), best=best, all=times)


def _time_recorded(x: Tensor, copies: list[list[LoraMember]], layout: LoraTiles) -> float:
    """As a recording launches it, for the highest rank of the default pool."""
    wide = layout._replace(most_rank=512)
    return took([partial(lora.add_adapters, x, members, wide) for members in copies])


def _time_masked(x: Tensor, copies: list[list[LoraMember]], tiles: list[Tile]) -> float:
    mask = torch.ones(len(x), len(copies[0][0].a), dtype=torch.bool, device=DEVICE)
    for start, tokens, low, rank in tiles:
        mask[start : start + tokens, low : low + rank] = False

    def add_all(members: list[LoraMember]) -> None:
        for y, a, b, *_ in members:
            y.addmm_((x @ a.T).masked_fill(mask, 0), b)

    calls: list[Call] = [partial(add_all, members) for members in copies]
    return took(calls)
