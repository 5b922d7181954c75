"""Imports point one way, and `import ultrafuser` stays cheap.

    errors, files, progress, recipes <- fusion <- modeling <- decoding, training
    <- evaluation, analysis, serving <- demo <- cli

`sandbox`, and `synthesis` which uses it, stand alone: they know the first four, nothing else of the package. The
sources are parsed, not run, so that an import inside a function or behind `TYPE_CHECKING` counts like any other.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = "ultrafuser"

FOUNDATION = {"errors", "files", "progress", "recipes"}
MODEL = FOUNDATION | {"fusion", "modeling"}
LIBRARY = MODEL | {"decoding", "training"}
USES = LIBRARY | {"evaluation", "analysis", "serving", "sandbox"}
# For each unit, a folder or module directly below the package: the other units that it may import.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "recipes": {"errors"},
    "fusion": FOUNDATION,
    "modeling": FOUNDATION | {"fusion"},
    "decoding": MODEL,
    "training": MODEL,
    "evaluation": LIBRARY | {"sandbox"},
    "analysis": LIBRARY,
    "serving": LIBRARY,
    "synthesis": FOUNDATION | {"sandbox"},
    "sandbox": FOUNDATION,
    "demo": USES,
    "cli": USES | {"synthesis", "demo"},
    "__main__": {"cli"},
    # The package itself: registers the model with the Auto classes and re-exports the public names.
    "__init__": MODEL,
}
HEAVY_OR_OPTIONAL = ["vllm", "lm_eval", "mergekit", "fastapi", "matplotlib"]


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import; `from a import b` counts as `a.b`.

    `package` holds the parts of the package that the source belongs to: relative imports resolve against it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def unit_of(path: Path, root: Path) -> str:
    """The folder or module directly below the package that a source file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def violations(root: Path) -> list[str]:
    """Every import below `root`, the package's folder, that points the wrong way: file, line and reason."""
    found = []
    for path in sorted(root.rglob("*.py")):
        unit = unit_of(path, root)
        where = path.relative_to(root).as_posix()
        if unit not in MAY_IMPORT:
            found.append(f"{where}: {unit} has no place in MAY_IMPORT; give it one")
            continue
        package = (PACKAGE, *path.relative_to(root).parts[:-1])
        for line, module in imported_modules(ast.parse(path.read_text(encoding="utf-8")), package):
            top, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            # The version is the one public name that lives in the package itself; all others have a home.
            if top != PACKAGE or target in {unit, "__version__"} | MAY_IMPORT[unit]:
                continue
            if unit == "cli" and target not in MAY_IMPORT:
                continue  # a command is a user of the package: it may take public names from the front door
            found.append(f"{where}:{line}: {unit} may not import {module}")
    return found


def test_imports_point_one_way():
    assert violations(SOURCE / PACKAGE) == []


def test_the_rule_itself_has_no_cycle():
    order = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("fusion/gate.py", "from ultrafuser.modeling.model import UltraFuserForCausalLM"),
        ("fusion/gate.py", "def late():\n    import ultrafuser.modeling"),
        ("fusion/gate.py", "from ..modeling import model"),
        ("fusion/gate.py", "from .. import modeling"),
        ("modeling/model.py", "if TYPE_CHECKING:\n    from ultrafuser.training.data import Batch"),
        ("modeling/deep/er.py", "from ...cli import main"),
        ("modeling/model.py", "from ultrafuser import UltraFuserForCausalLM"),
        ("training/stages.py", "import ultrafuser"),
        ("training/stages.py", "from ultrafuser.decoding import engine"),
        ("training/data.py", "from ultrafuser import analysis, errors"),
        ("analysis/plots.py", "from ultrafuser.demo import held_out"),
        ("synthesis/topics.py", "from ultrafuser.modeling import templates"),
        ("sandbox.py", "from ultrafuser.evaluation import tasks"),
        ("errors.py", "from ultrafuser.files import atomic_write"),
        ("__init__.py", "from .cli import main"),
        ("leftovers.py", "import json"),
    ],
)
def test_wrong_imports_are_found(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("fusion/gate.py", "import torch\nfrom ultrafuser.errors import ShapeError\nfrom . import mix"),
        ("modeling/model.py", "from ultrafuser.fusion.gate import Gate\nfrom ..files import atomic_write"),
        ("training/stages.py", "from ultrafuser import __version__\nfrom .data import Batch"),
        ("analysis/report.py", "def late():\n    from ultrafuser.training.data import read"),
        ("cli/demo.py", "from ultrafuser import UltraFuserForCausalLM, demo, synthesis"),
        ("__init__.py", "from ultrafuser.modeling.model import UltraFuserForCausalLM"),
        ("sandbox.py", "import ultrafuserlike"),
    ],
)
def test_right_imports_pass(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []


def test_fusion_needs_torch_only():
    allowed = set(sys.stdlib_module_names) | {"torch", PACKAGE}
    for path in (SOURCE / PACKAGE / "fusion").rglob("*.py"):
        for line, module in imported_modules(
            ast.parse(path.read_text(encoding="utf-8")), (PACKAGE, "fusion")
        ):
            assert module.partition(".")[0] in allowed, f"{path.name}:{line}: {module}"


def test_import_brings_in_nothing_heavy_or_optional():
    code = "import json, sys, ultrafuser; print(json.dumps([ultrafuser.__file__, *sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    file, *modules = json.loads(result.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(SOURCE)
    top_levels = {module.partition(".")[0] for module in modules}
    assert top_levels.isdisjoint(HEAVY_OR_OPTIONAL), sorted(top_levels.intersection(HEAVY_OR_OPTIONAL))
