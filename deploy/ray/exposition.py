"""Several engines' metrics as one text: every sample says which replica it is of.

Knows the text format only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.+)$")


def merged(texts: Mapping[str, str]) -> str:
    """Prometheus text of every replica, by its name, as one; the samples of a family stay together."""
    heads: dict[str, list[str]] = {}
    samples: defaultdict[str, list[str]] = defaultdict(list)
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ")[2]
                heads.setdefault(family, [])
            if not line.startswith("#"):
                samples[family] += label_sample(line, replica)
            elif line not in heads[family]:
                heads[family].append(line)
    families = ("\n".join([*heads[family], *samples[family]]) for family in heads)
    return "".join(f"{family}\n" for family in families)


def label_sample(line: str, replica: str) -> list[str]:
    """The sample with its replica as one more label; nothing where the line is no sample."""
    found = SAMPLE.match(line)
    if found is None:
        return []
    name, labels, value = found.groups()
    replica_label = f'replica="{replica}"'
    return [f"{name}{{{','.join([replica_label, labels] if labels else [replica_label])}}} {value}"]
