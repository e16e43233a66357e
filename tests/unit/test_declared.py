"""What train/ takes from libraries: requirements.txt, or that of a flag, declares each import, CONTRIBUTING.md lists
each private name."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions

from conftest import REPO, TRAIN

FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TRAIN.rglob("*.py"))}
OWN = {"sft"}
PRIVATE = re.compile(r"_[a-z]\w+")
NOT_PRIVATE = {"_exit"}  # os._exit is documented


def imported() -> dict[str, str]:
    """{top-level package: a file that imports it}."""
    found = {}
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found[node.module.partition(".")[0]] = path.name
    return found


def declared() -> set[str]:
    files = (REPO / "requirements.txt", REPO / "requirements-4bit.txt")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return {name.lower().replace("_", "-") for name in re.findall(r"^([\w-]+)==", text, re.M)}


def private_names() -> Iterator[tuple[str, str]]:
    """(name, file) of what is private to another's class or module."""
    defined = {node.name for tree in FILES.values() for node in ast.walk(tree) if hasattr(node, "name") and node.name}
    for path, tree in FILES.items():
        overrides = path.name in ("trainer.py", "reshard.py")  # methods of the Trainer
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (node.attr not in defined or overrides):
                yield node.attr, path.name
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith("sft"):
                yield from ((alias.name, path.name) for alias in node.names)
            elif overrides and isinstance(node, ast.FunctionDef):
                yield node.name, path.name


def test_each_import_is_declared():
    known = packages_distributions()
    for name, file in imported().items():
        if name not in OWN | sys.stdlib_module_names:
            distributions = {each.lower().replace("_", "-") for each in known.get(name, [name])}
            assert distributions & declared(), f"{file} imports {name}, which requirements.txt lacks"


def listed() -> Iterator[tuple[str, str]]:
    """(name, file) of CONTRIBUTING's table."""
    for line in (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            _, what, where, *_ = line.split("|")
            names, files = re.findall(r"(?<!\w)_[a-z]\w+", what), re.findall(r"(\w+\.py)`", where)
            yield from ((name, file) for name in names for file in files)


def test_each_private_name_is_listed_with_its_file():
    used = {(name, file) for name, file in private_names() if PRIVATE.fullmatch(name) and name not in NOT_PRIVATE}
    assert {name for name, _ in used} >= {"_tr_loss", "_save", "_encode_plus"}
    assert sorted(used - set(listed())) == []
    assert sorted({name for name, _ in listed()} - {name for name, _ in used}) == [], "used no more"
