"""Windows, macOS and Linux run the same code: what one of them lacks stands behind a question or a fallback.

Two proofs: every room is read (its syntax tree), and the chain from raw text to a server runs on a Python
whose POSIX has been taken away.
"""

import ast
import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import Llama, ModelConfig, add_lora, next_token_loss
from tests import ROOT
from tests.conftest import write_rows
from train import PretrainConfig, make_optimizers

ROOMS = sorted(
    path for place in (".", "lib", "corpus", "tools") for path in ROOT.glob(f"{place}/*.py")
)

# ---- what is not everywhere

MODULES = {
    "crypt",
    "curses",
    "fcntl",
    "grp",
    "msvcrt",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
}
MODULES |= {"syslog", "termios", "tty", "winreg"}
LACKING = {
    "os": "chown chroot ctermid fchmod fchown fdatasync fork forkpty getegid geteuid getgid getgroups "
    "getloadavg getpgid getpriority getrandom getresuid getsid getuid killpg lchown lockf memfd_create "
    "mkfifo mknod nice openpty pipe2 posix_fadvise posix_fallocate posix_spawn pread pwrite readv "
    "register_at_fork sched_getaffinity sched_setaffinity sendfile setpgid setpriority setsid setuid statvfs "
    "sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 WNOHANG writev "
    "O_CLOEXEC O_DIRECTORY O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC",
    "select": "devpoll epoll kqueue poll",
    "signal": "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigwait "
    "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH",
    "socket": "AF_UNIX MSG_DONTWAIT MSG_NOSIGNAL SO_REUSEPORT TCP_CORK",
    "time": "clock_settime pthread_getcpuclockid tzset",
}
LACKING = {module: set(names.split()) for module, names in LACKING.items()}
PLACES = ("/proc", "/dev", "/sys", "/tmp", "/etc", "/usr")
EXCUSES = {
    "ImportError",
    "ModuleNotFoundError",
    "AttributeError",
    "OSError",
    "TypeError",
    "Exception",
}
NO_FILE_NAME = set('<>:"|?*\\')
NOT_FILES = {
    "Progress",
    "bz2",
    "gzip",
    "lzma",
    "os",
    "self",
    "tarfile",
    "webbrowser",
}  # whose .open is another


def asks(test):
    """Does a condition ask which platform this is?"""
    text = ast.unparse(test)
    return any(word in text for word in ("hasattr(", "getattr(", "os.name", "sys.platform"))


def caught(node):
    """The names of the exceptions that a `try` or a `with suppress(...)` takes."""
    if isinstance(node, ast.Try):
        types = [handler.type for handler in node.handlers if handler.type is not None]
    else:
        calls = [
            item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)
        ]
        types = [
            arg
            for call in calls
            if ast.unparse(call.func).endswith("suppress")
            for arg in call.args
        ]
    return {name.strip() for one in types for name in ast.unparse(one).strip("()").split(",")}


def guarded(node, parents):
    """Is a node reached only where the platform has been asked, or its refusal is caught?"""
    child = node
    while child in parents:
        parent = parents[child]
        if (
            isinstance(parent, ast.If | ast.IfExp)
            and child is not parent.test
            and asks(parent.test)
        ):
            return True
        inside = isinstance(parent, ast.Try) and (child in parent.body or child in parent.handlers)
        if inside and caught(parent) & EXCUSES:  # with a fallback, or the fallback itself
            return True
        if isinstance(parent, ast.With) and caught(parent) & EXCUSES:
            return True
        if isinstance(parent, ast.FunctionDef) and child in parent.body:
            before = parent.body[: parent.body.index(child)]
            if any(
                isinstance(s, ast.If) and asks(s.test) and isinstance(s.body[-1], ast.Return)
                for s in before
            ):
                return True
        child = parent
    return False


def keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def mode_of(call):
    """The mode of an `open`, "r" if it names none; None where it is no literal."""
    at = 1 if isinstance(call.func, ast.Name) else 0
    given = keywords(call).get("mode") or next(iter(call.args[at : at + 1]), ast.Constant("r"))
    return given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else None


def about_files(call):
    """Yields what is wrong with how a call opens, reads, writes or moves a file."""
    function, given = ast.unparse(call.func), keywords(call)
    name = function.rpartition(".")[2]
    method = isinstance(call.func, ast.Attribute)
    base = ast.unparse(call.func.value) if method else ""
    if (
        name == "open"
        and base.split(".")[0] not in NOT_FILES
        and (mode := mode_of(call))
        and "b" not in mode
    ):
        if "encoding" not in given:
            yield "open() of text without encoding="
        if (
            set(mode) & set("wax+") - {"+"}
            and "newline" not in given
            and "+" not in mode
            and "devnull" not in ast.unparse(call)
        ):
            yield "open() to write text without newline="
    if method and name == "read_text" and not call.args and "encoding" not in given:
        yield "read_text() without encoding="
    if method and name == "write_text" and len(call.args) < 2 and "encoding" not in given:
        yield "write_text() without encoding="
    if method and name == "rename":
        yield "rename() fails over what exists on Windows; os.replace() does not"
    if method and name in ("symlink", "symlink_to", "link", "hardlink_to"):
        yield f"{name}() takes rights on Windows"
    if "text" in given and "encoding" not in given and function.startswith("subprocess"):
        yield "a process's text without encoding="
    if "preexec_fn" in given:
        yield "preexec_fn needs fork"
    if name in ("get_context", "set_start_method") and any(
        isinstance(arg, ast.Constant) and arg.value in ("fork", "forkserver") for arg in call.args
    ):
        yield "only spawn is everywhere"


def complaints(source):
    """Returns [(line, what)] of all in a program that some platform can't do."""
    tree, found = ast.parse(source), []
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    loose = [n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)]  # docstrings

    def note(node, what):
        found.append((node.lineno, what))

    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in MODULES and not guarded(node, parents):
                note(node, f"import {name} without a fallback")
        if isinstance(node, ast.ImportFrom) and LACKING.get(node.module, set()) & {
            a.name for a in node.names
        }:
            note(node, f"from {node.module}: import the module and ask it")
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.count(".") == 1 and not guarded(node, parents):
            module, _, attribute = name.partition(".")
            if attribute in LACKING.get(module, ()):
                note(node, f"{name} without a fallback")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in loose:
            place = "/" + node.value.split("/")[1] if node.value.startswith("/") else ""
            if place in PLACES and not guarded(node, parents):
                note(node, f"{node.value} without a fallback")
        if isinstance(node, ast.Call):
            for what in about_files(node):
                note(node, what)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = node.right.values if isinstance(node.right, ast.JoinedStr) else [node.right]
            texts = [
                p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)
            ]
            if NO_FILE_NAME & set("".join(texts)):
                note(node, "a character that Windows has in no file name")
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_no_room_needs_what_a_platform_lacks(room):
    assert complaints(room.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import fcntl", "import fcntl"),
        ("def f():\n    import resource", "import resource"),
        ("os.fork()", "os.fork"),
        ("signal.signal(signal.SIGHUP, f)", "signal.SIGHUP"),
        ("from signal import SIGKILL", "ask it"),
        ("n = len(os.sched_getaffinity(0))", "sched_getaffinity"),
        ("select.poll()", "select.poll"),
        ("Path('/proc/meminfo').read_text('utf-8')", "/proc/meminfo"),
        ("open(path)", "without encoding"),
        ("path.open('w', encoding='utf-8')", "without newline"),
        ("path.read_text()", "read_text"),
        ("path.write_text(text)", "write_text"),
        ("os.rename(a, b)", "os.replace"),
        ("a.symlink_to(b)", "symlink_to"),
        ("subprocess.run(words, text=True)", "process's text"),
        ("multiprocessing.get_context('fork')", "only spawn"),
        ("path = folder / f'{a}:{b}.log'", "file name"),
        ("if os.name == 'nt':\n    pass\nos.sync()", "os.sync"),
    ],
)
def test_the_reader_finds_each_of_them(source, what):
    assert any(what in text for _, text in complaints(source)), complaints(source)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None",
        "n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1",
        "def f(s):\n    if not hasattr(select, 'poll'):\n        return 1\n    return select.poll()",
        "with suppress(OSError, ValueError), open('/proc/self/statm', 'rb') as f:\n    f.read()",
        "'/proc is read'\nopen(path, 'rb')\npath.read_text(encoding='utf-8')\nos.open(path, os.O_RDONLY)",
        "open(path, 'a', encoding='utf-8', newline='\\n')\nos.replace(a, b)\nfolder / f'{a}.json'",
    ],
)
def test_the_reader_lets_fallbacks_pass(source):
    assert complaints(source) == []


# ---- 64-bit floats, which MPS has none of

DOUBLES = {
    "model": {"rope_tables", "read_safetensors"},  # on the CPU, when a model is built or read
    "runtime": {"sum"},  # on the CPU, where numbers travel
    "sample": {"draw"},  # which asks for MPS
}


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_64_bit_floats_stay_where_they_are_known_to_be_on_the_cpu(room):
    tree, found = ast.parse(room.read_text(encoding="utf-8")), set()
    for top in tree.body:
        for part in top.body if isinstance(top, ast.ClassDef) else [top]:
            words = {ast.unparse(n) for n in ast.walk(part) if isinstance(n, ast.Attribute)}
            if {"torch.float64", "torch.double"} & words or any(
                word.endswith(".double") for word in words
            ):
                found.add(getattr(part, "name", None) or part.targets[0].id)
    assert found == DOUBLES.get(room.stem, set())


class NoDoubles(TorchDispatchMode):
    """Fails at an operation that gives 64-bit floats."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return out


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lora"])
def test_no_operation_of_a_training_step_gives_64_bit_floats(optimizer):
    model = Llama(
        ModelConfig(n_layer=2, d_model=64, n_head=4, num_key_value_heads=2, d_ff=96, vocab_size=384)
    )
    model = add_lora(model, 4, 8.0) if optimizer == "lora" else model
    cfg = PretrainConfig(optimizer="muon" if optimizer == "muon" else "adamw")
    optimizers, ids = make_optimizers(cfg, model, torch.device("cpu")), torch.arange(32).view(2, 16)
    with NoDoubles():
        loss, _ = next_token_loss(model.train(), {"ids": ids, "labels": ids})
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert torch.nn.utils.get_total_norm(gradients) > 0
        for one in optimizers:
            one.step()


# ---- the chain, on a Python without POSIX

PLATFORM = """
import builtins, fcntl, io, multiprocessing, os, sys, types, warnings

LACKING, MODULES, ROOMS = {lacking}, {modules}, {rooms}

def ours():
    "Is it one of our rooms that asks? Python's own library and packages were built for this system."
    folder = os.path.dirname(sys._getframe(2).f_globals.get("__file__", ""))
    return folder in [os.path.join({root!r}, name).rstrip("/") for name in ("", "lib", "corpus", "tools")]

def hide(module, names):
    hidden = {{name: module.__dict__.pop(name) for name in names if name in module.__dict__}}

    def getattr(name):
        if name in hidden and not ours():
            return hidden[name]
        raise AttributeError(name)

    module.__getattr__ = getattr

for name, names in LACKING.items():
    hide(__import__(name), names)
multiprocessing.set_start_method("spawn")
real_import, real_open, real_os_open, real_rename = builtins.__import__, io.open, os.open, os.rename

def import_(name, *args, **kwargs):
    if name in MODULES and ours():
        if name == "msvcrt":
            return msvcrt
        raise ImportError(name)
    return real_import(name, *args, **kwargs)

def open_(file, *args, **kwargs):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file", file)
    assert not ours() or "encoding" in kwargs or "b" in str([*args, *kwargs.values()]), (file, "encoding=")
    return real_open(file, *args, **kwargs)

def os_open(path, *args, **kwargs):
    if ours() and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_os_open(path, *args, **kwargs)

def rename(old, new, **kwargs):
    if os.path.exists(new):
        raise FileExistsError(17, "File exists", new)
    return real_rename(old, new, **kwargs)

def locking(descriptor, mode, count):
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
builtins.__import__, builtins.open, io.open, os.open, os.rename = import_, open_, open_, os_open, rename
# so does text read or written by pathlib without encoding=
warnings.filterwarnings("error", category=EncodingWarning, module="^(" + "|".join(ROOMS) + "|__main__)$")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of programs that see the platform above, in an empty folder: (env, folder)."""
    folder = tmp_path_factory.mktemp("bare")
    rooms = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOMS]
    text = PLATFORM.format(modules=MODULES, lacking=LACKING, rooms=rooms, root=str(ROOT))
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = os.environ | {
        "PYTHONPATH": path,
        "PYTHONWARNDEFAULTENCODING": "1",
        "OMP_NUM_THREADS": "1",
    }
    return env, folder


SEVERAL = """
import json, runpy, sys

for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def commands(bare, *lines):
    """Runs a command, or several in one process: importing torch takes longer than any of them."""
    env, folder = bare
    lines = [[str(ROOT / program), *words] for program, *words in lines]
    words = [sys.executable, *(lines[0] if len(lines) == 1 else ("-c", SEVERAL, json.dumps(lines)))]
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=240
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_platform_lacks_what_it_should_and_locks_files_its_own_way(bare):
    """A room sees no fork; of two who open a file the first holds it until it closes it."""
    code = """
import os, types
from lib import folders
room = types.ModuleType("room")
room.__file__ = folders.__file__
exec("import os; forks = hasattr(os, 'fork')", room.__dict__)
one, other = (open("lock", "a+", encoding="utf-8") for _ in range(2))
print(room.forks, folders.lock_file(one), folders.lock_file(other))
one.close()
print(folders.lock_file(other))
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=bare[1], env=bare[0], capture_output=True, encoding="utf-8")
    assert done.stdout.split() == ["False", "True", "False", "True"], done.stderr


def test_from_raw_text_to_a_server_without_posix(bare, tiny_documents):
    folder = bare[1]
    texts = [f"{text}\n\n{n}" for n, text in enumerate(tiny_documents)] * 2
    write_rows(folder / "docs.jsonl", ({"text": text} for text in texts))
    rows = ({"prompt": f"What is {n}?", "response": str(n)} for n in range(40))
    write_rows(folder / "chats.jsonl", rows)
    size = ("--vocab_size=384", "--sequence_length=32")
    data = (
        "--input_path=docs.jsonl",
        "--output_dir=data",
        "--use_minhash=false",
        "--train_ratio=0.7",
    )
    commands(bare, ("data.py", *size, *data, "--num_workers=2"))
    steps = (
        "--max_steps=2",
        "--warmup_steps=1",
        "--save_steps=1",
        "--eval_steps=2",
        "--sample_tokens=2",
    )
    steps += ("--batch_size=2", "--device=cpu")
    shape = (
        "--n_layer=1",
        "--d_model=32",
        "--n_head=2",
        "--d_ff=64",
        "--data_path=data",
        "--output_dir=base",
    )
    begun = ("--model_path=base", "--dataset_path=chats.jsonl", "--output_dir=sft", "--lora_r=2")
    chat = ("--chat", "--prompt=What is 7?", "--max_new_tokens=4", "--device=cpu")
    commands(
        bare,
        ("train.py", *size, *shape, *steps),
        ("sft.py", *begun, *steps, "--num_train_epochs=none"),
        ("sample.py", "--model_path=sft", *chat),
        ("tools/workspace.py", "status"),
    )
    assert (folder / "sft" / "final" / "model.safetensors").is_file()
    serve(bare, "sft")


def serve(bare, model):
    env, folder = bare
    words = [ROOT / "server.py", f"--model_path={model}", "--port=0", "--device=cpu"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=env, stdout=log, stderr=log
        )
    try:
        while not (
            told := re.search(r"^http://\S+", (folder / "server.log").read_text("utf-8"), re.M)
        ):
            assert server.poll() is None, (folder / "server.log").read_text(encoding="utf-8")
            time.sleep(0.1)
        address = told[0]
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
            assert json.load(answer)["object"] == "list"
        body = json.dumps({"prompt": "What is 7?", "max_new_tokens": 3}).encode()
        asked = urllib.request.Request(
            f"{address}/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)
    finally:
        server.terminate()
        server.wait()
