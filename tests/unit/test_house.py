"""The house: each file and function has a size that can be read, and imports go down."""

import ast
from pathlib import Path

import pytest

from conftest import REPO, TRAIN

OURS = sorted(path for path in TRAIN.rglob("*.py") if "output" not in path.relative_to(TRAIN).parts)
TESTS = sorted((REPO / "tests").rglob("*.py"))
# Rooms from the top down: a module imports from its own room and from lower ones.
ROOMS = (
    ("train", "merge_lora_weight", "chat", "show_rows"),
    ("sft.start",),
    ("sft.merging", "sft.training", "sft.nodes"),
    ("sft.model",),
    ("sft.parser", "sft.checks", "sft.arguments"),
    ("sft.data",),
    ("sft.messages", "sft.processes", "sft.stopping"),
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(TRAIN).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> int:
    for number, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return len(ROOMS)


@pytest.mark.parametrize("path", OURS, ids=module_of)
def test_imports_go_down(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            continue
        for module in imported:
            upwards = room_of(module) < room_of(module_of(path))
            assert not upwards, f"{path.name}:{node.lineno} imports {module}, which is above it"


@pytest.mark.parametrize("path", OURS + TESTS, ids=lambda path: str(path.relative_to(REPO)))
def test_files_and_functions_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    longest = 300 if path in OURS else 400
    assert text.count("\n") <= longest, f"{text.count(chr(10))} lines, at most {longest}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = node.end_lineno - first + 1
            assert lines <= 60 or path in TESTS, f"{node.name}: {lines} lines, at most 60"


@pytest.mark.parametrize("path", OURS, ids=module_of)
def test_every_module_and_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py":
        return
    assert ast.get_docstring(tree), "the module has no docstring"
