"""The architecture as a test: who may import whom, what lies at the top level, how long a function may be."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest

from tests import ROOT

# room -> the rooms it may import; ARCHITECTURE.md tells why
ARROWS = {
    "configurator": set(),
    "tokenizer": {"configurator"},
    "model": {"configurator"},
    "losses": set(),
    "lora": {"configurator", "model"},
    "formats": {"configurator"},
    "sources": {"configurator", "formats"},
    "chats": {"configurator", "tokenizer", "formats", "sources"},
    "starter": {"configurator", "sources"},
    "clean": {"configurator"},
    "dedup": {"configurator"},
    "shards": {"configurator"},
    "cards": {"shards"},
    "prepare": {"configurator", "tokenizer", "sources", "clean", "dedup", "shards", "cards"},
    "data": {"configurator", "tokenizer", "sources", "shards", "prepare", "chats", "starter"},
    "scoring": {"model", "losses"},
    "world": {"configurator", "model", "losses"},
    "checkpoint": {"configurator", "shards"},
    "curves": {"configurator"},
    "log": {"configurator", "model", "world", "curves"},
    "plan": {"configurator", "model", "losses", "schedule", "world"},
    "train": {
        *("configurator", "tokenizer", "model", "losses", "scoring", "data", "world", "checkpoint"),
        *("schedule", "survival", "curves", "log", "plan"),
    },
    "schedule": {"configurator"},
    "survival": {"configurator", "world"},
    "tuning": {"configurator", "tokenizer", "lora", "data", "train"},
    "sft": {
        *("configurator", "tokenizer", "losses", "lora", "data", "world", "checkpoint"),
        *("train", "tuning"),
    },
    "dpo": {
        *("configurator", "tokenizer", "model", "losses", "lora", "data", "world", "checkpoint"),
        *("survival", "train", "tuning"),
    },
    "packed": {"model"},
    "engine": {"configurator", "tokenizer", "model", "lora", "packed"},
    "chat": {"configurator", "tokenizer", "engine"},
    "export": {"configurator", "tokenizer", "model", "lora"},
    "sample": {"configurator", "tokenizer", "engine", "chat"},
    "smoke": {"configurator", "tokenizer", "starter", "engine"},
    "assess": {"configurator"},
    "eval": {
        "configurator",
        "chats",
        "formats",
        "sources",
        "model",
        "lora",
        "engine",
        "scoring",
        "smoke",
        "assess",
        "world",
    },
    "scheduler": {"engine"},
    "wire": set(),
    "api": {"configurator", "tokenizer", "engine", "scheduler"},
    "server": {"configurator", "engine", "lora", "scheduler", "wire", "api"},
    "workspace": {"configurator", "shards", "checkpoint"},
    "host": {"configurator", "workspace", "world", "plan", "train"},
    "session": {"configurator", "model", "shards", "host", "workspace"},
}
ROOMS = sorted(path.stem for path in ROOT.glob("*.py"))
CODE = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The top-level names of everything that `path` imports, wherever in the file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_along_the_arrows(room):
    assert room in ARROWS, f"{room}.py is a new room: give it arrows here and a row in ARCHITECTURE.md"
    ours = set(imports(ROOT / f"{room}.py")) & set(ROOMS)
    assert ours == ARROWS[room]


def test_the_arrows_have_no_cycle_and_training_and_generation_stay_apart():
    @cache
    def reach(room):
        return {room}.union(*(reach(other) for other in ARROWS[room]))  # in a cycle: RecursionError

    assert ARROWS.keys() == {*ROOMS}
    assert all(map(reach, ARROWS))
    assert not reach("train") & {"engine", "sample", "eval", "server"}
    assert not (reach("sample") | reach("server")) & {"train", "data", "prepare"}


def test_importing_the_reading_rooms_needs_no_torch_and_no_cleaning_packages():
    code = "import sys, data; print(*({'torch', 'ftfy', 'datasketch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_in_the_map(room):
    assert f"`{room}.py`" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert f"{room}.py" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_shows_the_same_arrows():
    row = re.compile(r"^\| `(\w+)\.py` \|[^|]*\| ([^|]*) \|", flags=re.M)
    shown = dict(row.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    assert shown.keys() >= {*ROOMS}
    for room, text in shown.items():
        if room in ROOMS and not text.startswith("the above"):
            assert {*text.split(", ")} - {"nothing"} == ARROWS[room], room


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_functions_fit_on_a_screen(path):
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {
        n.name: n.end_lineno - n.lineno - len((ast.get_docstring(n) or "").splitlines()) for n in functions
    }
    assert {name: length for name, length in lengths.items() if length > 65} == {}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_nothing_loads_code_from_data(path):
    names = {n.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Name)}
    assert not names & {"exec", "eval", "globals", "pickle"}
    text = path.read_text(encoding="utf-8")
    assert "weights_only=False" not in text
    assert "trust_remote_code" not in text


@pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="not in a clone")
def test_tests_can_be_committed():
    done = subprocess.run(["git", "check-ignore", "tests/test_model.py"], cwd=ROOT, capture_output=True)
    assert done.returncode == 1
