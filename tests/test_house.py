"""The architecture as a test: the folders say who may import whom; sizes are counted."""

import ast
import subprocess
import sys
from functools import cache

import pytest

from tests import ROOT

FOLDERS = ("lib", "corpus", "tools")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", *FOLDERS)
    for path in sorted((ROOT / folder).glob("*.py"))
}
CODE = [*MODULES.values(), *ROOT.glob("benchmarks/*.py")]
named = pytest.mark.parametrize("name", MODULES)
each_file = pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(nodes):
    """Yields the dotted names of our modules that are imported anywhere below `nodes`."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        yield from (name for name in found if name in MODULES)


@cache
def at_import(name):
    """The modules of ours that a module imports at its top level, functions left out."""
    skipped = ast.FunctionDef, ast.ClassDef
    body = [n for n in tree_of(MODULES[name]).body if not isinstance(n, skipped)]
    return set(imports(body))


@cache
def behind(name):
    """The modules that importing `name` loads, itself included; a cycle is a RecursionError."""
    return {name}.union(*(behind(other) for other in at_import(name)))


def folder_of(name):
    return name.rpartition(".")[0]


@named
def test_folders_import_downwards_only(name):
    allowed = {"lib": {"lib"}, "corpus": {"lib", "corpus"}, "": {"", "lib", "corpus"}}
    allowed["tools"] = {"", *FOLDERS}
    assert {folder_of(n) for n in at_import(name)} <= allowed[folder_of(name)]


def test_nothing_imports_tools_but_a_function_of_a_program():
    for name in MODULES:
        if folder_of(name) in ("lib", "corpus"):
            everything = set(imports([tree_of(MODULES[name])]))
            assert not {n for n in everything if n.startswith("tools.")}, name


def test_training_and_generation_stay_apart():
    assert not behind("train") & {"sample", "eval", "server"}
    assert not (behind("sample") | behind("server")) & {"train", "data", "sft", "dpo"}
    both = {name for name in MODULES if behind(name) >= {"train", "sample"}}
    assert {name for name in both if folder_of(name) != "tools"} == {"grpo"}


@each_file
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree_of(path))


@each_file
def test_nothing_loads_code_from_data(path):
    names = {n.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Name)}
    assert not names & {"exec", "eval", "globals", "pickle"}
    text = path.read_text(encoding="utf-8")
    assert "weights_only=False" not in text
    assert "trust_remote_code" not in text


def test_preparing_data_needs_no_torch_until_it_cleans():
    code = "import sys, data; print(*({'torch', 'ftfy'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_a_training_and_a_sample_load_no_file_of_corpus_nor_tools():
    for program in ("train", "sample"):
        assert not {name for name in behind(program) if name.startswith(("corpus.", "tools."))}


def test_what_stands_behind_train_is_read_in_an_afternoon():
    lines = [len(MODULES[n].read_text(encoding="utf-8").splitlines()) for n in behind("train")]
    assert len(lines) <= 10
    assert sum(lines) <= 3_600


def test_nothing_but_the_programs_and_their_folders_lies_at_the_top():
    programs = {"model", "data", "train", "sft", "dpo", "grpo", "eval", "sample", "server"}
    assert {name for name in MODULES if not folder_of(name)} == programs


@each_file
def test_functions_fit_on_a_screen(path):
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef)]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    limits = {"fit": 90} if path.name == "train.py" else {}
    assert {name: n for name, n in lengths.items() if n > limits.get(name, 60)} == {}


def test_no_name_is_defined_in_two_modules():
    owners = {}
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            targets = getattr(node, "targets", []) if isinstance(node, ast.Assign) else []
            names = {
                n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)
            }
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            for each in names - {"main"}:
                owners.setdefault(each, set()).add(name)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}
