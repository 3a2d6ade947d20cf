"""Imports point downwards only: parses every module of synthfast/ and cli/."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. Parts on one line are siblings, which do not import each other.
LAYERS = [
    ("errors",),
    ("ops",),
    ("artifacts", "config", "distributed", "environment", "parallel"),
    ("assets",),
    ("data", "models", "diffusion", "attacks"),
    ("training", "sampling", "selection"),
    ("evaluation",),
    ("scoring",),
    ("report",),
    ("cli",),
    ("__main__",),
]
# The same within synthfast/data.
DATA_LAYERS = [
    ("images", "machine", "grids"),
    ("joined", "formats"),
    ("selection", "storage"),
    ("shards",),
    ("sources",),
    ("transfer",),
    ("loaders",),
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
DATA_RANK = {part: rank for rank, parts in enumerate(DATA_LAYERS) for part in parts}
EXTENSIONS = {"_C", "_cuda", "_host"}


def modules() -> dict[str, Path]:
    """Name below ``synthfast``, such as "data.formats.npy" ("" is the package itself), to file."""
    found = {}
    for folder, prefix in ((ROOT / "synthfast", ()), (ROOT / "cli", ("cli",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Modules of synthfast that ``source`` imports anywhere, functions and TYPE_CHECKING included, named as in MODULES."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["synthfast", *filter(None, module.split("."))]
                kept = package[: len(package) - node.level + is_package]
                base = ".".join(filter(None, (*kept, base)))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    found = {name.removeprefix("synthfast").removeprefix(".") for name in found if f"{name}.".startswith("synthfast.")}
    # "data.formats.npy.map_npy" names the module data.formats.npy; a part that no file holds stays, so that it is reported.
    return {_module_of(name) for name in found}


def _module_of(name: str) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in MODULES or parts[0] in EXTENSIONS:
            return ".".join(parts[:length])
    return name if name in RANK else ""  # a name of the package itself, such as __version__


def complaint(importer: str, imported: str) -> str | None:
    """What is wrong with an import, if anything."""
    above, below = importer.split(".")[0], imported.split(".")[0]
    if above == "" and below:
        return f"synthfast/__init__.py imports {imported}; it imports nothing of the package"
    if below in EXTENSIONS:
        return None if above == "ops" else f"{importer} imports the extension {below}; only synthfast.ops does"
    if above == below == "data":
        return _complaint_within_data(importer, imported)
    if above == below or below == "":
        return None
    if above not in RANK or below not in RANK:
        return f"{importer} imports {imported}: give {above if above not in RANK else below} a place in LAYERS"
    if RANK[below] == RANK[above]:
        return f"{importer} imports its sibling {imported}"
    if RANK[below] > RANK[above]:
        return f"{importer} imports {imported}, which lies above it"
    return None


def _complaint_within_data(importer: str, imported: str) -> str | None:
    above, below = (f"{name}..".split(".")[1] for name in (importer, imported))
    if not above or (above == below and above):
        return None
    if above not in DATA_RANK:
        return f"give data.{above} a place in DATA_LAYERS"
    if below not in DATA_RANK:
        return f"{importer} imports {imported} and not the module that has the name"
    if DATA_RANK[below] == DATA_RANK[above]:
        return f"{importer} imports its sibling {imported}"
    return f"{importer} imports {imported}, which lies above it" if DATA_RANK[below] > DATA_RANK[above] else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    path = MODULES[module]
    found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert [c for c in (complaint(module, name) for name in sorted(found)) if c] == []


def test_every_part_has_a_layer():
    assert {name.split(".")[0] for name in MODULES} - {""} <= set(RANK)
    assert {name.split(".")[1] for name in MODULES if name.startswith("data.")} == set(DATA_RANK)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("data.formats.npy", "from synthfast.sampling import generate", "which lies above it"),
        ("data.formats.npy", "def f():\n    from synthfast import training", "which lies above it"),
        ("data.formats.npy", "import synthfast.models.unet", "its sibling"),
        ("data.formats.npy", "from ...models import unet", "its sibling"),
        ("data.formats.npy", "from synthfast.data.shards.manifest import Request", "which lies above it"),
        ("data.storage.cache", "from synthfast.data import selection", "its sibling"),
        ("data.storage.cache", "from synthfast.data import ImageSet", "not the module that has the name"),
        ("data", "from synthfast.data.transfer import copying", None),
        ("data.loaders.dali", "from synthfast.data.shards.shard_set import ShardSet", None),
        ("models.unet", "from synthfast import _C", "only synthfast.ops does"),
        ("models.unet", "import synthfast._cuda", "only synthfast.ops does"),
        ("models.unet", "from synthfast._host import philox4x32", "only synthfast.ops does"),
        ("assets.make_digits", "from synthfast.data import load", "which lies above it"),
        ("", "from synthfast import errors", "imports nothing of the package"),
        ("", "from . import ops", "imports nothing of the package"),
        ("novelty", "from synthfast import errors", "give novelty a place"),
        ("cli.main", "from synthfast import __version__, errors\nfrom synthfast.data.formats.npy import map_npy", None),
        ("ops._extension", "from synthfast import _C, _cuda", None),
        ("data.formats.npy", "from . import png\nfrom .png import encode_png\nimport numpy, synthfast", None),
    ],
)
def test_the_check_itself(module, source, expected):
    complaints = [c for c in (complaint(module, name) for name in imports(source, module, module == "")) if c]
    assert len(complaints) == (expected is not None) and (expected is None or expected in complaints[0])


HEAVY = {"torch", "numpy", "torchvision", "synthfast.ops"}


def imported_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import synthfast", "import synthfast.errors", "import synthfast.cli.main"])
def test_starts_without_torch(statement):
    assert not HEAVY & imported_after(statement)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["--nonsense"], 2)])
def test_help_needs_no_torch(arguments, status):
    """`synthfast --help` and a misspelt option answer at once. -X importtime names what is imported on standard error."""
    command = [sys.executable, "-X", "importtime", "-m", "synthfast", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert run.returncode == status, run.stderr
    assert "synthfast.cli.main" in imported
    assert not HEAVY & imported
