"""Grouped LoRA in Triton's interpreter: any layout of tiles, against the oracle in torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.model.kernels.triton import lora, oracles
from service.model.kernels.triton.shapes import (
    LORA_PROGRAMS,
    LORA_RANK,
    LORA_TOKENS,
    LoraMember,
    LoraShape,
    LoraTiles,
    lora_shape,
)

Tile = tuple[int, int, int, int]
UNUSED: Tile = (0, 0, 0, 0)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SMALL = LoraShape(64, 2, 32, 16)
RANK_ROWS = 104


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_layout(tiles: Sequence[Tile], gates: Sequence[int] = (), most_rank: int = 0) -> LoraTiles:
    """Without gates none has one; without `most_rank` it is that of the tiles."""
    rows = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)
    weights = torch.rand(len(tiles), LORA_TOKENS) + 0.5
    most = most_rank or max((tile[3] for tile in tiles), default=0)
    return LoraTiles(rows, weights, torch.tensor(gates or [-1] * len(tiles), dtype=torch.int32), most)


def make_members(tokens: int, n_in: int, outputs: Sequence[int], dtype: torch.dtype) -> list[LoraMember]:
    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype) / 8

    ranks = torch.full((RANK_ROWS,), RANK_ROWS, dtype=torch.int32)
    return [
        LoraMember(draw(tokens, n_out), draw(RANK_ROWS, n_in), draw(RANK_ROWS, n_out), ranks)
        for n_out in outputs
    ]


def check_layout(
    tiles: Sequence[Tile],
    tokens: int,
    n_in: int = 96,
    outputs: Sequence[int] = (40,),
    dtype: torch.dtype = torch.float32,
    shape: LoraShape = SMALL,
) -> None:
    """The kernels give what the oracle gives; tokens without a rank row keep their bits."""
    x, layout = torch.randn(tokens, n_in, dtype=dtype), make_layout(tiles)
    members = make_members(tokens, n_in, outputs, dtype)
    for member in members:
        member.y[:, 0] = -0.0  # what adding 0 would change
    check_members(x, members, layout, shape)


def check_members(
    x: Tensor, members: Sequence[LoraMember], layout: LoraTiles, shape: LoraShape = SMALL
) -> None:
    before = [member._replace(y=member.y.clone()) for member in members]
    lora.add_adapters(x, members, layout, shape)
    for member, old in zip(members, before, strict=True):
        want = oracles.add_adapters(x, old, layout)
        assert float((member.y.float() - want).norm() / want.norm()) < TOLERANCE[x.dtype], layout.tiles
        base = sorted(set(range(len(x))) - set(list_adapted(layout, member.ranks)))
        assert torch.equal(member.y[base].view(torch.uint8), old.y[base].view(torch.uint8)), layout.tiles


def list_adapted(layout: LoraTiles, ranks: Tensor) -> list[int]:
    """The tokens that meet a rank row."""
    tiles = [tile for tile in layout.tiles.tolist() if min(tile[3], int(ranks[tile[2]]))]
    return [start + i for start, count, *_ in tiles for i in range(count)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("outputs", [(40,), (40, 24), (40, 8, 72)], ids=str)
def test_several_outputs_in_one_launch(outputs: Sequence[int], dtype: torch.dtype) -> None:
    tiles = [(0, 3, 0, 8), UNUSED, (5, 1, 8, 40), (6, 16, 72, 16)]
    check_layout(tiles, 23, outputs=outputs, dtype=dtype)


@pytest.mark.parametrize(
    "tiles",
    [
        [(0, 1, 0, 8)],
        [(0, 16, 16, 16), (16, 16, 16, 16), (32, 1, 16, 16)],  # one adapter's long run
        [(3, 1, 5, 0)],  # an adapter without rows here
        [UNUSED, UNUSED],
        [(0, 2, 0, 8), (0, 2, 40, 24), (0, 2, 99, 5)],  # three adapters of each token
        [(4, 1, 0, 0), (4, 1, 8, 8), (5, 1, 8, 8)],  # the first of two has no rows
        [(0, 1, 8, 8), UNUSED, (1, 3, 0, 3)],
        [UNUSED, (0, 1, 8, 8)],  # an unused tile before token 0 is none of its tiles
    ],
    ids=str,
)
def test_a_layout(tiles: Sequence[Tile]) -> None:
    check_layout(tiles, 33)


def test_random_layouts() -> None:
    draw = random.Random(5)
    for _ in range(4):
        tiles: list[Tile] = []
        token = 0
        for _ in range(3):
            token += draw.randint(0, 3)
            count = draw.choice([1, 1, 2, 7, 16])
            for _ in range(draw.choice([1, 1, 2])):
                rank = draw.choice([0, 1, 8, 16, 33])
                tiles.append((token, count, draw.randint(0, RANK_ROWS - rank), rank))
            tiles += [UNUSED] * draw.randint(0, 1)
            token += count
        check_layout(tiles, token + 1)


def test_the_bits_of_a_row_do_not_depend_on_its_company() -> None:
    """Only the first row of a tile can be compared here: numpy's product differs from row to row."""
    tiles: list[Tile] = [(0, 3, 0, 8), (5, 1, 8, 40), (6, 16, 72, 16)]
    x, layout = torch.randn(22, 96), make_layout(tiles)
    members = make_members(22, 96, (40,), torch.float32)
    y = members[0].y.clone()
    lora.add_adapters(x, members, layout, SMALL)
    for tile, (token, _, low, rank) in enumerate(tiles):
        lonely = members[0]._replace(y=y[token : token + 1].clone())
        weights = torch.full((1, LORA_TOKENS), float(layout.weights[tile, 0]))
        own = make_layout([(0, 1, low, rank)])._replace(weights=weights)
        lora.add_adapters(x[token : token + 1], [lonely], own, SMALL)
        assert torch.equal(lonely.y[0], members[0].y[token])


@pytest.mark.parametrize("ranks", [32, 64])
def test_more_ranks_at_a_time(ranks: int) -> None:
    check_layout([(0, 2, 0, 40), (2, 1, 50, 8)], 4, shape=SMALL._replace(ranks=ranks))


@pytest.mark.parametrize("biased", [False, True])
def test_a_gate_grows_what_the_layer_has_made_but_its_bias(biased: bool) -> None:
    """Also of the second member, and of one of two adapters of a token."""
    tiles: list[Tile] = [(0, 3, 0, 8), (3, 1, 40, 7), (4, 2, 60, 8), (4, 2, 80, 3), (6, 1, 0, 8), UNUSED]
    members = make_members(8, 96, (40, 24), torch.float32)
    if biased:
        members = [member._replace(bias=torch.randn(member.y.shape[1])) for member in members]
    layout = make_layout(tiles, gates=[-1, 47, -1, 83, -1, -1])
    for member in members:
        member.b[47], member.b[83] = torch.randn(2, member.y.shape[1])  # as large as what it grows
    check_members(torch.randn(8, 96), members, layout)


def test_each_output_has_as_many_rows_of_an_adapter_as_its_layer_says() -> None:
    """What a layer leaves alone keeps its bits, though the adapter has a gate elsewhere."""
    first, second = make_members(4, 96, (40, 24), torch.float32)
    second = second._replace(ranks=torch.zeros_like(second.ranks))
    second.ranks[50] = 3
    layout = make_layout([(0, 1, 0, 8), (1, 1, 20, 8), (2, 2, 50, 8)], gates=[-1, 27, 57])
    second.y[:2, 0] = -0.0
    check_members(torch.randn(4, 96), [first, second], layout)


def test_what_is_launched_for_higher_ranks_serves_lower_ones_to_the_bit() -> None:
    """As a recording does; of the highest rank a program takes several parts."""
    x = torch.randn(5, 96)
    most = LORA_PROGRAMS * LORA_RANK + 24
    tiles: list[Tile] = [(0, 1, 0, most), (1, 2, 90, 4), (4, 1, 70, 17)]
    (member,) = make_members(5, 96, (40,), torch.float32)
    tight = member._replace(y=member.y.clone())
    layout = make_layout(tiles)
    lora.add_adapters(x, [tight], layout, SMALL)
    check_members(x, [member], layout._replace(most_rank=RANK_ROWS + 60))
    assert torch.equal(member.y, tight.y)


def test_what_decides_the_order_of_a_sum_is_the_weight_alone() -> None:
    assert lora_shape(4096).splits == 8
    assert lora_shape(64).splits == 1


def test_outputs_may_be_columns_of_one_tensor_and_pools_of_other_widths() -> None:
    tiles: list[Tile] = [(1, 2, 0, 8)]
    x, layout = torch.randn(4, 96), make_layout(tiles)
    whole = torch.zeros(4, 64)
    members = [
        member._replace(y=y)
        for member, y in zip(
            make_members(4, 96, (40, 24), torch.float32), torch.split(whole, [40, 24], 1), strict=True
        )
    ]
    lora.add_adapters(x, members, layout, SMALL)
    blank = [member._replace(y=torch.zeros_like(member.y)) for member in members]
    want = [oracles.add_adapters(x, member, layout) for member in blank]
    assert torch.allclose(whole, torch.cat(want, 1), atol=1e-5)


def test_no_tiles_and_no_ranks_are_no_work() -> None:
    members = make_members(2, 96, (40,), torch.float32)
    y = members[0].y.clone()
    lora.add_adapters(torch.randn(2, 96), members, make_layout([]))
    lora.add_adapters(torch.randn(2, 96), members, make_layout([(0, 1, 0, 0)]))
    assert torch.equal(members[0].y, y)


def test_what_does_not_fit_together_is_refused() -> None:
    x, layout = torch.randn(2, 96), make_layout([(0, 1, 0, 8)])
    (member,) = make_members(2, 96, (40,), torch.float32)
    wide = torch.randn(RANK_ROWS, 192)[:, :96]
    cases: list[tuple[Tensor, list[LoraMember], LoraTiles, str]] = [
        (x, [], layout, "0 outputs in one launch"),
        (x, [member] * 4, layout, "4 outputs in one launch"),
        (x, [member], layout._replace(tiles=layout.tiles.long()), "not int32"),
        (x, [member], layout._replace(tiles=layout.tiles[:, :3]), "not int32"),
        (x, [member], layout._replace(weights=layout.weights[:, :3]), "weights \\(1, 3\\)"),
        (x, [member], layout._replace(gates=layout.gates[:0]), "gates \\(0,\\) for 1 tiles"),
        (x, [member._replace(ranks=member.ranks[:3])], layout, "ranks \\(3,\\)"),
        (x, [member._replace(ranks=member.ranks.long())], layout, "of torch.int64 for"),
        (x, [member._replace(bias=torch.zeros(3))], layout, "have biases of their widths"),
        (x, [member, member._replace(bias=torch.zeros(40))], layout, "have biases of their widths"),
        (x[None], [member], layout, "are no rows"),
        (x[:, :64], [member], layout, "do not fit together"),
        (x, [member._replace(b=member.b[1:])], layout, "do not fit together"),
        (x, [member._replace(y=member.y[:1])], layout, "do not fit together"),
        (x, [member, member._replace(a=wide)], layout, "differ in their strides"),
        (x, [member._replace(y=torch.zeros(40, 2).T)], layout, "differ in their strides"),
    ]
    for inputs, members, tiles, reason in cases:
        with pytest.raises(ValueError, match=reason):
            lora.add_adapters(inputs, members, tiles)
