"""Several engines' metrics as one text: every sample says which replica it is of.

Knows the text format only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.+)$")


def merged(texts: Mapping[str, str]) -> str:
    """Prometheus text of every replica, by its name, as one; the samples of a family stay together."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ")[2]
                heads.setdefault(family, [])
            if line.startswith("#"):
                heads[family] += [line] if line not in heads[family] else []
            elif found := SAMPLE.match(line):
                name, labels, value = found.groups()
                samples.setdefault(family, []).append(
                    f'{name}{{replica="{replica}"{"," + labels if labels else ""}}} {value}'
                )
    return "".join("\n".join([*heads[family], *samples.get(family, [])]) + "\n" for family in heads)
