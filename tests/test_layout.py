"""The floor plan: imports go one way, files stay short, and the README stays a page."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a module may import only modules of lower floors. So the parts know nothing of each other, and
# there is no circle.
FLOORS = {
    "leaves": "extras.activations extras.batch extras.files extras.hub extras.images extras.machine extras.matmul "
    "extras.scores extras.terminal",
    "linear layers": "extras.quantize",
    "files of a checkpoint": "extras.chat_template extras.compat extras.config_file extras.limits extras.lora "
    "extras.saving extras.tokenizer_files extras.weight_files",
    "parts": "llama vision tokenizer sampling load",
    "configuration": "config",
    "checks": "extras.checks extras.generation extras.hidden_states extras.inputs extras.memory",
    "inputs": "extras.adapters processor",
    "quantising": "extras.calibration",
    "users of the parts": "extras.benchmarks extras.chat extras.data extras.lora_training",
    "model": "llava",
    "commands": "train evaluate bench",
}
FLOOR = {module: floor for floor, modules in enumerate(FLOORS.values()) for module in modules.split()}
MODEL_FILES = ["llava", "llama", "vision", "tokenizer", "sampling", "config", "processor", "load"]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere: at its top, in functions, or for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FLOOR.keys()


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def test_every_module_has_its_floor():
    assert {module_name(path) for path in SOURCES} == FLOOR.keys() | {"extras"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_from_lower_floors(path):
    name = module_name(path)
    upward = {other for other in imported(path) if FLOOR[other] >= FLOOR.get(name, 0)}
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which is not on a lower floor"


def test_the_import_reader_sees_imports_in_functions_and_for_type_checkers(tmp_path):
    (tmp_path / "some.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llava import X\n"
        "def f():\n    import train\n    from extras import data\n"
    )
    assert imported(tmp_path / "some.py") == {"llava", "train", "extras.data"}


@pytest.mark.parametrize(
    "path", [*SOURCES, *(ROOT / "tiny").glob("*.py"), *(ROOT / "notebooks").rglob("*.py")], ids=lambda path: path.name
)
def test_no_file_is_longer_than_400_lines(path):
    assert lines(path) <= 400


def test_the_model_is_read_in_1500_lines():
    assert sum(lines(ROOT / f"{name}.py") for name in MODEL_FILES) <= 1500


def test_the_top_level_has_at_most_eleven_modules():
    assert len(list(ROOT.glob("*.py"))) <= 11


@pytest.mark.parametrize(("name", "most"), [("README.md", 220), ("CONTRIBUTING.md", 100)])
def test_pages_stay_short(name, most):
    assert lines(ROOT / name) <= most


def test_docs_pages_open_with_the_question_they_answer():
    for page in (ROOT / "docs").glob("*.md"):
        title, question = [line for line in page.read_text(encoding="utf-8").splitlines() if line][:2]
        assert title.startswith("# "), page.name
        assert "?" in question, page.name
