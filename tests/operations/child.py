"""Run as the service runs its children: tells its parent where it finds modules, and how it reads."""

from __future__ import annotations

import importlib
import locale
import os
import sys
from multiprocessing.connection import Connection

from service.child_process import settle_child


def main(descriptor: str, form: str, level: str) -> None:
    settle_child(form, level)
    kinds = [importlib.import_module(name).tqdm for name in ("tqdm", "huggingface_hub.utils")]
    told = {
        "folder": os.getcwd(),
        "path": sys.path,
        "bars": [str(kind) for kind in kinds if not kind().disable],
        "opens": locale.getpreferredencoding(False).lower(),
        "names": sys.getfilesystemencoding(),
    }
    with Connection(int(descriptor)) as pipe:
        pipe.send(told)


if __name__ == "__main__":
    main(*sys.argv[1:])
