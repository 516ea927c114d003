"""Every command of every document: run in an empty folder on toy sizes, or parsed and marked.

A line of a `sh` block is run, in the order of the documents, unless a comment at its end says that
it wants the network, a GPU or time. A `console` block is a command after `$ ` and what it prints:
those lines have to come, in that order, numbers aside. Lines of a `text` block that stand for a
message have to be in the code.
"""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from lib.config import configure
from tests import ROOT
from tests.commands import TARGETS, VARIABLES, flags_of, with_file
from tests.conftest import link_code
from tests.runs import Run

WALKED = ("README.md", "docs/REFERENCE.md", "docs/SESSIONS.md", "ARCHITECTURE.md")
WALKED += ("docs/TROUBLESHOOTING.md", "docs/PROMISES.md", "docs/RECIPE.md", "AGENTS.md")
WALKED += ("docs/SEVERAL_GPUS.md",)
PAGES = {n: (ROOT / n).read_text(encoding="utf-8") for n in (*WALKED, "benchmarks/RESULTS.md")}
MARK = re.compile(r"#.*\b(network|GPU|minutes|hours|days)\b")  # why a line is not run
SETTING = re.compile(r"[A-Z][A-Z0-9_]*=")
FILES = [path for name in (".", "lib", "corpus", "tools") for path in (ROOT / name).glob("*.py")]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FILES)}

# Flags added to, or put in place of, those on the page: the same commands, on toy sizes.
SHAPE = "--n_layer=1 --d_model=32 --n_head=2 --d_ff=64 --sequence_length=64 --vocab_size=400"
STEPS = "--batch_size=2 --gradient_accumulation_steps=1 --warmup_steps=1 --dtype=fp32"
SHRUNK = {
    "data.py": "--max_docs=60 --min_length=50 --num_workers=1",
    "train.py": f"{SHAPE} {STEPS} --eval_rows=4 --max_minutes=none --sample_tokens=4",
    "sft.py": f"{STEPS} --sample_tokens=4",
    "dpo.py": STEPS,
    "sample.py": "--max_new_tokens=4",
    # our own prompts do not fit 64 positions
    "eval.py": "--max_new_tokens=2 --custom_prompts=prompts.txt --context=64",
    "server.py": "--port=0",
}
OTHERS = {"cmp", "curl", "mv", "rm", "truncate"}  # programs beside ours that a page may call


# ---- reading the pages


def blocks(page, kind):
    """Yields (line number, text) of the fenced blocks of a kind."""
    for block in re.finditer(rf"^```{kind}\n(.*?)^```$", PAGES[page], flags=re.S | re.M):
        yield PAGES[page].count("\n", 0, block.start()) + 2, block[1]


def commands(page):
    """Yields (line number of its block, command with its comment, None or the lines it prints)."""
    entries = []
    for number, text in blocks(page, "sh"):
        lines = text.replace("\\\n", "").splitlines()
        entries += [(number, s, None) for s in lines if s.strip() and not s.startswith("#")]
    for number, text in blocks(page, "console"):
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, *printed = part.replace("\\\n", "").splitlines()
            entries.append((number, command, printed))
    return sorted(entries, key=lambda entry: entry[0])


def mentions(page):
    """Every command between backquotes, and those of indented blocks."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.S | re.M)
    spans = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]
    spans += re.findall(r"^    (.+)$", prose, flags=re.M)
    start = re.compile(r"(\w+=\S* )*(make|python|torchrun|pytest|\.venv/bin/python) ")
    return [text.replace("\\|", "|") for text in spans if start.match(text)]


def sound_commands(page):
    """Every command of a page but those that show an error."""
    shown = [c for _, c, printed in commands(page) if "error: " not in "".join(printed or ())]
    return shown + mentions(page)


def problem_with(command):
    """None for a command whose script, subcommand, flags, target and variables there are."""
    words = [w for w in shlex.split(command, comments=True) if w not in ("...", "|")]
    if "make" in words:
        settings = {w.partition("=")[0] for w in words if SETTING.match(w)}
        targets = {w for w in words if not SETTING.match(w)} - {"make"}
        return sorted(targets - {*TARGETS}) + sorted(settings - {*VARIABLES, "PYTHON"}) or None
    words = with_file(words)
    script = next((w for w in words if w.endswith(".py")), None)
    if script is None or not set(words) & {"python", "torchrun", ".venv/bin/python"}:
        return None
    if not (ROOT / script).is_file():
        return f"no {script}"
    rest = words[words.index(script) + 1 :]
    flags = [w.partition("=")[0].removeprefix("--") for w in rest if w.startswith("--")]
    flags = [flag for flag in flags if flag != "help"]
    if script.startswith("benchmarks"):
        text = (ROOT / script).read_text(encoding="utf-8")
        return [flag for flag in flags if f'"--{flag}"' not in text and not passed_on(flag)] or None
    word = rest[0] if rest and re.fullmatch(r"[a-z][a-z_-]*", rest[0]) else None
    known = flags_of(script, word)
    if known is None:
        return f"{script} knows no {word}"
    return [flag for flag in flags if not {flag, flag.removeprefix("no_")} & known] or None


def passed_on(flag):
    """Is it --sft.KEY or --dpo.KEY of a benchmark, a flag of that script?"""
    script, dot, key = flag.partition(".")
    return dot and key in flags_of(f"{script}.py", None)


def messages():
    """Yields a pattern for every long text in the code, with anything in place of its values."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(text) for text in texts if isinstance(text, str)) >= 20:
            yield "".join(re.escape(t) if isinstance(t, str) else ".+" for t in texts)


def test_every_message_that_is_not_provoked_here_is_in_the_code():
    known = re.compile("|".join(f"(?:{form})" for form in messages()), flags=re.S)
    lines = [ln for page in WALKED for _, text in blocks(page, "text") for ln in text.splitlines()]
    assert [line for line in lines if not known.fullmatch(line.removeprefix("error: "))] == []
    assert len(lines) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_its_script_flags_target_and_variables(page):
    assert {c: problem for c in sound_commands(page) if (problem := problem_with(c))} == {}


# ---- running them


def shrink(command, keep=False):
    """The words of a command with SHRUNK's flags instead of its own of the same name.

    keep: its own stay, and the others are added.
    """
    words = with_file(shlex.split(command, comments=True))
    words = [re.sub(r"(_steps=|step_0+)(100|50)\b", shorter, word) for word in words]
    script = next((w for w in words if w in SHRUNK), None)
    at = words.index(script) + 1 if script else 0
    if script is None or re.fullmatch("[a-z_]+", words[at] if at < len(words) else "-"):
        return words
    extra = SHRUNK[script].split()
    if script == "data.py" and "docstrings" in command:
        extra.append("--vocab_size=400")  # 60 documents support no more
    if script in ("train.py", "sft.py", "dpo.py"):
        extra += [] if re.search(r"--(max|save)_steps=", command) else ["--max_steps=2"]
    own, ours = ({w.partition("=")[0] for w in some} for some in (words, extra))
    if keep:
        return words + [flag for flag in extra if flag.partition("=")[0] not in own]
    return [w for w in words if w.partition("=")[0] not in ours] + extra


def shorter(match):
    """100 steps are 4, 50 are 2."""
    count = int(match[2]) // 25
    return f"{match[1][:5]}{count:06}" if match[1].startswith("step_") else f"{match[1]}{count}"


def python(folder, words, env):
    """`python WORDS` in a folder, on the CPU; in a child of the fork server."""
    os.chdir(folder)
    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} | env)
    sys.argv = words
    sys.path.insert(0, str(folder))
    runpy.run_path(words[0], run_name="__main__")


class Walk:
    """A folder with the code and nothing else, as after git clone, and its running server."""

    def __init__(self, folder):
        self.folder, self.count, self.server, self.url = folder, 0, None, ""
        folder.mkdir()
        link_code(folder)
        (folder / "prompts.txt").write_text("a\n")
        chat = {"prompt": "What is it?", "response": "A"}  # what a reader of the pages brings
        pair = {"prompt": "What is it?", "chosen": "A", "rejected": "B"}
        for name, row in (("my_chats", chat), ("my_pairs", pair)):
            rows = [row | {"prompt": f"What is {n}?"} for n in range(4)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def begin(self, words):
        """Starts `[NAME=VALUE ...] python SCRIPT ...`; returns the Run."""
        env = dict(w.split("=", 1) for w in words if SETTING.match(w))
        at = next(n for n, w in enumerate(words) if w.endswith(".py"))
        self.count += 1
        log = self.folder.parent / "logs" / f"{self.count}.log"
        return Run(log, python, (self.folder, words[at:], env), 2 if "torchrun" in words else 1)

    def other(self, command):
        """Runs another program, or curl at the server; returns (status, its output)."""
        if command.startswith("curl "):
            command = command.replace("http://127.0.0.1:8000", self.url).replace('s": 100', 's": 4')
        words = shrink(command)
        assert words[0] in OTHERS, command
        if not shutil.which(words[0]):
            return 0, None
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    def run(self, command, keep):
        """Runs a command to its end, a server until the next command but curl.

        Returns (status, output).
        """
        if self.server and not command.startswith("curl "):
            self.server.signal(signal.SIGTERM)
            assert self.server.wait() == [0]
            self.server = None
        if ".py" not in command and "-m tools." not in command:
            return self.other(command)
        run = self.begin(shrink(command, keep))
        if " server.py " in command:
            with suppress(AssertionError):  # it may be a mistake, and end
                run.until(lambda: "http://" in run.text)
                self.server, self.url = run, re.search(r"http://[\d.:]+", run.text)[0]
                return 0, run.text
        return max(run.wait()), run.text


def missing(expected, text):
    """The first of the expected lines that does not come in `text` after those before it."""
    lines = iter(text.splitlines())
    for line in (line for line in expected if line.strip() not in ("", "...")):
        form = re.sub(r"\d[\d,.]*", "\0", line).replace("...", "\1")
        form = re.escape(form).replace("\0", r"\d[\d,.]*").replace("\1", ".*")
        if not any(re.fullmatch(form.replace(r"\ ", r"\s+"), printed.strip()) for printed in lines):
            return line
    return None


def test_every_command_runs_in_the_order_of_the_pages(tmp_path):
    walk, count = Walk(tmp_path / "clone"), 0
    with socket.socket() as other:  # the port that the pages speak of is taken, by us or others
        with suppress(OSError):
            other.bind(("127.0.0.1", 8000))
            other.listen()
        for page, (number, command, printed) in ((p, c) for p in WALKED for c in commands(p)):
            if command.startswith("make ") or MARK.search(command):
                continue
            status, text = walk.run(command, printed is not None)
            report = f"{page}, block at line {number}: {command}\n{(text or '')[-3000:]}"
            assert (status != 0) == ("error: " in "".join(printed or ())), report
            assert text is None or missing(printed or (), text) is None, report
            if command.startswith("curl ") and text:
                assert json.loads(text).keys() >= {"response", "prompt", "generation_config"}
            count += 1
    assert count > 60


# ---- names, numbers and code on the pages


def test_every_test_that_is_named_exists():
    pages = "".join(PAGES[page] for page in WALKED)
    named = set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", pages))
    assert len(named) > 80
    for file, name in sorted(named):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"\ndef {name}(" in text, f"{file}::{name}"


def names_of(module):
    """The functions, classes and variables at the top level of a module."""
    for node in (n for path, tree in TREES.items() if path.stem == module for n in tree.body):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            yield from (n.id for n in ast.walk(target or ast.Pass()) if isinstance(n, ast.Name))
        yield getattr(node, "name", None)


def test_every_name_in_a_module_that_a_page_mentions_exists():
    modules = "|".join(path.stem for path in TREES)
    pairs = {p for page in WALKED for p in re.findall(rf"`({modules})\.(\w+)`", PAGES[page])}
    pairs = {(module, name) for module, name in pairs if name not in ("py", "model")}  # files
    assert len(pairs) > 20
    assert [f"{m}.{name}" for m, name in sorted(pairs) if name not in {*names_of(m)}] == []


def test_the_counts_in_the_table_are_true():
    from model import ModelConfig, count_parameters

    pattern = r"^\| (\w+) \| (\d+) x (\d+) \|.*\| ([\d,]+) \| ([\d,]+) \|$"
    rows = re.findall(pattern, PAGES["README.md"], flags=re.M)
    assert len(rows) == 5
    for name, layers, width, bare, total in rows:
        cfg = configure(ModelConfig, [str(ROOT / f"configs/{name}.json")], foreign_keys=True)
        counts = count_parameters(cfg)
        assert (cfg.n_layer, cfg.d_model) == (int(layers), int(width))
        assert [f"{counts[key]:,}" for key in ("non_embedding", "total")] == [bare, total]
