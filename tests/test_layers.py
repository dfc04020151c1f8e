"""The structure of the package: nothing imports upwards, nothing imports in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "rotate_edit"
# Lowest first. Modules of one entry may import each other, as long as there is no circle.
LAYERS = (
    ("errors", "files", "console"),
    ("machine",),
    ("models",),
    ("vocabulary",),
    ("channels",),
    ("edits",),
    ("evaluation",),
    ("reporting",),
    ("recipe", "estimate"),
    ("session",),
    ("channel_job",),
    ("search",),
    ("pipeline",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# These may be imported from anywhere in the package, and only hand names on.
ENTRY_POINTS = {"rotate_edit", "rotate_edit.__main__"}


def module_name(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it, type checking left out."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in inner}
    return {module for module in found if module in MODULES} - {name}


def place(name: str) -> str:
    """The package or top-level module that a module belongs to."""
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("name", sorted(set(MODULES) - ENTRY_POINTS))
def test_no_module_imports_from_above(name: str) -> None:
    for other in imports(name) - ENTRY_POINTS:
        assert LEVELS[place(other)] <= LEVELS[place(name)], f"{name} imports {other}"


def test_there_is_no_circle() -> None:
    graph = {name: imports(name) for name in MODULES if name not in ENTRY_POINTS}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_there_are_at_most_eight_packages() -> None:
    packages = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert len(packages) <= 8
    assert set(packages) <= set(LEVELS)


SECTIONS = ("locate", "decompose", "select", "edit", "save", "evaluate", "concepts", "protect", "seed")


def test_the_recipe_is_read_in_three_modules() -> None:
    # Others may hold one and hand it on, but only these two look inside.
    readers = {
        name
        for name, path in MODULES.items()
        if any(
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name)
            and (node.value.id if isinstance(node.value, ast.Name) else node.value.attr) == "recipe"
            and node.attr in SECTIONS
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }  # fmt: skip
    assert readers - {"rotate_edit.recipe"} == {
        "rotate_edit.session",
        "rotate_edit.channel_job",
        "rotate_edit.pipeline",
    }


def test_no_module_but_their_own_knows_the_names_of_methods() -> None:
    from rotate_edit.edits.methods import method_names

    for name, path in MODULES.items():
        if name.startswith("rotate_edit.edits.methods"):
            continue
        texts = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & set(method_names()) - {"rank-one"} or name == "rotate_edit.recipe", f"{name} names a method"


@pytest.mark.parametrize("module", ["rotate_edit", "rotate_edit.recipe", "rotate_edit.cli.main"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'numpy', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_the_public_names_are_seen_and_are_what_they_say() -> None:
    import rotate_edit

    assert set(rotate_edit.__all__) <= set(dir(rotate_edit))
    assert all(getattr(rotate_edit, name).__doc__ for name in rotate_edit.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert typed == set(rotate_edit.__all__)
