"""The shape of the code: the rooms' arrows, who may import what, no cycles, and what must not be
imported before the service listens.
"""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "service").rglob("*.py"))
READS_ENVIRONMENT = {
    "service/commands.py",
    "service/user_folders.py",  # as libraries do, in each process: where this user's folders are
}
SETS_ENVIRONMENT = {  # of the processes they start
    "service/catalog/validator/process.py",
    "service/worker/process.py",
    "service/text/template_renderer.py",
}


def test_the_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout


def test_no_module_imports_itself_over_others() -> None:
    graph = grimp.build_graph("service", exclude_type_checking_imports=True, cache_dir=None)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_in_its_first_lines_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "no docstring"
    summary, *_ = docstring.split("\n\n")
    assert summary.endswith((".", ":", ";"))


def test_only_the_command_line_reads_settings_from_the_environment() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }
    assert found == READS_ENVIRONMENT | SETS_ENVIRONMENT


def test_nothing_heavy_is_imported_before_it_listens() -> None:
    """The first probe of an orchestrator is answered within a second; importing torch alone takes
    longer.
    """
    code = (
        "import sys; from service.settings import read_settings;"
        "import service.server; from service.app import create_app;"
        "create_app(read_settings({}, {'base': 'org/none'}));"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'tokenizers', 'bitsandbytes'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ADAPTERD_")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120
    )
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


# Names of Python's own that begin so, and are documented: a named tuple's, and one of sys
DOCUMENTED = {"service/model/draws.py": {"_replace"}, "service/process_start.py": {"_xoptions"}}


def find_foreign_private(tree: ast.Module) -> set[str]:
    """The private names that a module uses and does not define: those of a library. `os._exit` is public."""
    nodes = list(ast.walk(tree))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    used = {node.attr for node in attributes} | imported
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    return private - own - {"_exit"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_libraries_are_used_in_a_compat_file_alone(path: Path) -> None:
    if path.name == "compat.py":
        return
    documented = DOCUMENTED.get(str(path.relative_to(ROOT)), set())
    assert find_foreign_private(ast.parse(path.read_text(encoding="utf-8"))) == documented


HIRES = {"to_thread", "run_in_threadpool", "run_in_executor", "set_default_executor", "ThreadPoolExecutor"}


@pytest.mark.parametrize(
    "path",
    [*MODULES, *sorted((ROOT / "deploy" / "ray").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_thread_of_a_pool_is_of_a_kind(path: Path) -> None:
    """`service.threads` alone has pools, one for each kind of work: slow work in a pool that all share
    holds everything up.
    """
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
        node.id for node in nodes if isinstance(node, ast.Name)
    }
    imported = {name.name for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    hired = HIRES & (named | imported)
    assert hired == ({"ThreadPoolExecutor", "run_in_executor"} if path.name == "threads.py" else set())
