"""Draws a base's module tree with an adapter in place, as text, with repeated layers folded.

Runs in the API process, where the validator has sent the tree; must not know torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.adapter import LoraLayerSpec

GROUPS = 2  # kinds of layer drawn in full before the rest is only counted


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """A module: its name in its parent, how it describes itself, and its children.

    `shape` is (in, out) for a linear layer.
    """

    name: str
    text: str
    children: tuple[ModuleNode, ...] = ()
    shape: tuple[int, int] | None = None


def draw_architecture(
    tree: ModuleNode, patches: Sequence[LoraLayerSpec], dropout: float, features: Sequence[str] = ()
) -> str:
    """One line a module; an adapted layer shows its base_layer, lora_A, lora_B, rank, scaling, dropout.

    `features` are those that no layer shows.
    """
    by_module = {patch.module: patch for patch in patches}
    lines = _draw_lines(tree, "", by_module, dropout)
    if features:
        lines.append(f"with {', '.join(features)}, which PEFT itself runs beside the mixed batch")
    return "\n".join(lines) + "\n"


def _draw_lines(
    node: ModuleNode, path: str, patches: Mapping[str, LoraLayerSpec], dropout: float
) -> list[str]:
    if path in patches and node.shape:
        return _draw_adapted(node, patches[path], node.shape, dropout)
    prefix = f"{path}." if path else ""
    drawn: list[tuple[str, list[str]]] = []
    for child in node.children:
        lines = _draw_lines(child, prefix + child.name, patches, dropout)
        drawn.append((child.name, lines))
    title = f"({node.name}): {node.text}" if node.name else node.text
    return [title, *("  " + line for line in _join_children(drawn))]


def _join_children(drawn: Sequence[tuple[str, list[str]]]) -> list[str]:
    if len(drawn) > 1 and all(name.isdigit() for name, _ in drawn):
        return _fold_repeated(drawn)
    return [line for _, lines in drawn for line in lines]


def _draw_adapted(
    node: ModuleNode, patch: LoraLayerSpec, shape: tuple[int, int], dropout: float
) -> list[str]:
    (inside, outside), rank = shape, patch.rank
    kind = "DoRA" if patch.magnitude else "LoRA"
    lines = [
        f"({node.name}): {kind}(rank={rank}, scaling={patch.scaling:g}, dropout={dropout:g})",
        f"  (base_layer): {node.text}",
        f"  (lora_A): Linear(in_features={inside}, out_features={rank}, bias=False)",
        f"  (lora_B): Linear(in_features={rank}, out_features={outside}, bias=False)",
    ]
    if patch.magnitude:
        lines.append(f"  (lora_magnitude_vector): Parameter({outside})")
    return lines


def _fold_repeated(drawn: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Draws numbered siblings that look the same once; of a list with many kinds, the first few."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for name, (title, *rest) in drawn:
        _, _, unnumbered = title.partition(": ")
        alike.setdefault((unnumbered, *rest), []).append(int(name))
    folded: list[str] = []
    groups = list(alike.items())
    for (title, *rest), numbers in groups[:GROUPS]:
        times = f"{len(numbers)} x " if len(numbers) > 1 else ""
        folded += [f"({_format_runs(numbers)}): {times}{title}", *rest]
    hidden = sorted(number for _, numbers in groups[GROUPS:] for number in numbers)
    if hidden:
        folded.append(f"({_format_runs(hidden)}): as above, with other ranks, scalings or targets")
    return folded


def _format_runs(numbers: Sequence[int]) -> str:
    """0-3, 5, 7-8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
