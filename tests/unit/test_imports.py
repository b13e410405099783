"""Imports go one way, pipelines -> components -> dqo, and the quick commands load nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "sentence_transformers", "mlflow", "kfp", "matplotlib", "pandas")


def sources(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"no sources in {room}"
    return found


def imported(node: ast.AST) -> list[str]:
    """Full names of the modules that one statement imports; a relative import keeps its dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return []


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every import of a file with whether it runs when the module is imported."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for name in imported(node):
            yield name, at_import
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def root_of(name: str) -> str:
    return name.split(".")[0]


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text("import a.b, c\nif c:\n    from d import e\ndef f():\n    import g\n    from h.i import j\n")
    assert list(imports(path)) == [("a.b", True), ("c", True), ("d", True), ("g", False), ("h.i", False)]


@pytest.mark.parametrize("path", sources("dqo"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_knows_neither_kubeflow_nor_the_rooms_above(path: Path):
    forbidden = {"kfp", "kubernetes", "components", "pipelines"}
    assert [name for name, _ in imports(path) if root_of(name) in forbidden] == []


@pytest.mark.parametrize("path", sources("components"), ids=lambda path: str(path.relative_to(ROOT)))
def test_components_import_kfp_outside_and_the_library_inside_their_functions(path: Path):
    found = list(imports(path))
    if path.name in ("capacity.py", "trainjob.py"):  # no components; imported inside their functions
        assert not {root_of(name) for name, _ in found} & {"kfp", "components", "pipelines"}
        return
    assert [name for name, at_import in found if root_of(name) == "kfp" and not at_import] == []
    assert [name for name, at_import in found if root_of(name) == "dqo" and at_import] == []
    assert [name for name, _ in found if root_of(name) == "pipelines"] == []
    others = [(name, at_import) for name, at_import in found if root_of(name) == "components"]
    inside = {("components.capacity", False), ("components.trainjob", False)}
    assert set(others) <= {("components.image", True), *inside}


def test_every_component_calls_the_library():
    for path in sorted((ROOT / "components").glob("*/component.py")):
        assert any(root_of(name) == "dqo" for name, _ in imports(path)), path
        assert any(root_of(name) == "kfp" for name, _ in imports(path)), path


@pytest.mark.parametrize("room", ["dqo", "components", "pipelines"])
def test_no_relative_imports_that_would_hide_from_these_tests(room: str):
    assert [(path, name) for path in sources(room) for name, _ in imports(path) if name.startswith(".")] == []


@pytest.mark.parametrize(
    "code",
    [
        "import dqo.recipe",
        "import dqo.recipe; dqo.recipe.load('recipes/quickstart.yaml')",
        "import dqo.recipe; dqo.recipe.json_schema()",
        "from pipelines.cli import _parser; _parser().format_help()",
        "from pipelines.cli import _parser; a = _parser().parse_args(['recipe', 'check', 'recipes/quickstart.yaml'])\n"
        "assert a.run(a) == 0",
    ],
)
def test_recipes_and_help_load_nothing_heavy(code: str):
    report = f"import sys\n{code}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("dqo.registry", ("torch", "transformers", "peft")),
        ("dqo.stages.register", ("torch", "transformers", "peft")),
        ("pipelines.models", ("torch", "transformers", "peft")),
        ("pipelines.compare", ("torch", "transformers", "peft")),
        ("dqo.stages.prepare", ("peft", "transformers.modeling_utils", "sentence_transformers")),
    ],
)
def test_what_trains_nothing_does_not_wait_for_models(module: str, left_out: tuple[str, ...]):
    """Each of these takes longer to import than the command or the step takes to do its work."""
    code = f"import sys, {module}\nprint([m for m in {left_out!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
