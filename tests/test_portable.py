"""Windows, macOS and Linux run the same code: for what a platform lacks there is a fallback.

Two proofs: every module is read (its syntax tree), and the chain from raw text to a server runs on
a Python whose POSIX has been taken away.
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

FOLDERS = [ROOT, *(ROOT / name for name in ("lib", "corpus", "tools"))]
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]

# ---- what is not everywhere

MODULES = set("crypt curses fcntl grp msvcrt pty pwd readline resource syslog termios tty".split())
LACKING = {
    "os": "chown fchmod fchown fdatasync fork forkpty getegid geteuid getgid getloadavg getpgid "
    "getpriority getsid getuid killpg memfd_create mkfifo nice openpty pipe2 posix_fadvise "
    "posix_fallocate posix_spawn pread pwrite register_at_fork sched_getaffinity "
    "sched_setaffinity sendfile setpgid setpriority setsid setuid statvfs sync sysconf ttyname "
    "uname wait wait3 wait4 WNOHANG writev O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC",
    "select": "devpoll epoll kqueue poll",
    "signal": "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigwait "
    "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2",
    "socket": "AF_UNIX MSG_DONTWAIT MSG_NOSIGNAL SO_REUSEPORT TCP_CORK",
    "time": "clock_settime pthread_getcpuclockid tzset",
}
LACKING = {module: set(names.split()) for module, names in LACKING.items()}
PLACES = re.compile("/(proc|dev|sys|tmp|etc|usr)/")
# a function with one of these asks for the platform, or takes its refusal
QUESTIONS = re.compile(
    r"hasattr\(|getattr\(|os\.name|sys\.platform|suppress\(|except \(?(Import|OS|Attribute)Error"
)
NOT_FILES = {"bz2", "gzip", "lzma", "os", "self", "tarfile", "webbrowser", "Progress"}  # .open


def lacking(node):
    """Yields what a platform may lack in a node."""
    names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
    if isinstance(node, ast.Import):
        yield from MODULES.intersection(names)
    if isinstance(node, ast.ImportFrom):
        yield from LACKING.get(node.module, set()).intersection(names)
    if isinstance(node, ast.Attribute):
        module, _, name = ast.unparse(node).partition(".")
        yield from [f"{module}.{name}"] if name in LACKING.get(module, ()) else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and PLACES.match(node.value):
        yield node.value


def about_files(call):
    """Yields what differs between platforms in how a call opens, moves or starts something."""
    base, _, name = ast.unparse(call.func).rpartition(".")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    if name == "open" and base.split(".")[0] not in NOT_FILES:
        modes = [text for text in texts[-1:] if re.fullmatch("[rwaxbt+]+", str(text))]
        mode = getattr(keywords.get("mode"), "value", None) or "".join(modes) or "r"
        if "b" not in mode and "encoding" not in keywords:
            yield "open() of text without encoding="
        to_write = not {"b", "r", "+"} & set(mode) and "devnull" not in ast.unparse(call)
        if to_write and "newline" not in keywords:
            yield "open() to write text without newline="
    whole = {"read_text": 0, "write_text": 1}.get(name)
    if base and whole == len(call.args) and "encoding" not in keywords:
        yield f"{name}() without encoding="
    if base and name == "rename":
        yield "rename() fails over what exists on Windows; os.replace() does not"
    if base and name in ("symlink", "symlink_to", "link", "hardlink_to"):
        yield f"{name}() takes rights on Windows"
    if base == "subprocess" and "text" in keywords and "encoding" not in keywords:
        yield "a process's text without encoding="
    forks = name in ("get_context", "set_start_method") and "fork" in texts
    if "preexec_fn" in keywords or forks:
        yield "only spawn is everywhere"


def complaints(source):
    """Returns all in a program that some platform cannot do."""
    problems = []
    for node in ast.parse(source).body:
        for scope in node.body if isinstance(node, ast.ClassDef) else [node]:
            asks = QUESTIONS.search(ast.unparse(scope))
            for inner in ast.walk(scope):
                problems += [] if asks else lacking(inner)
                problems += about_files(inner) if isinstance(inner, ast.Call) else []
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_module_needs_what_a_platform_lacks(path):
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f():\n    import resource", "resource"),
        ("class C:\n    def f():\n        os.fork()", "os.fork"),
        ("from signal import SIGKILL", "SIGKILL"),
        ("signal.signal(signal.SIGHUP, f)\nif os.name == 'nt':\n    pass", "signal.SIGHUP"),
        ("Path('/proc/meminfo').read_text('utf-8')", "/proc/meminfo"),
        ("open(path)", "without encoding"),
        ("path.open('w', encoding='utf-8')", "without newline"),
        ("path.read_text()", "read_text"),
        ("os.rename(a, b)", "os.replace"),
        ("a.symlink_to(b)", "symlink_to"),
        ("subprocess.run(words, text=True)", "process's text"),
        ("multiprocessing.get_context('fork')", "only spawn"),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", None),
        ("n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1", None),
        ("with suppress(OSError), open('/proc/self/statm', 'rb') as f:\n    f.read()", None),
        ("open(path, 'rb')\npath.read_text(encoding='utf-8')\nos.open(path, os.O_RDONLY)", None),
        ("open(path, 'a', encoding='utf-8', newline='\\n')\nos.replace(a, b)", None),
    ],
)
def test_the_reader_finds_each_of_them_and_lets_fallbacks_pass(source, complaint):
    problems = complaints(source)
    assert any(complaint in text for text in problems) if complaint else problems == [], problems


# ---- 64-bit floats, which Apple's MPS lacks


class NoDoubles(TorchDispatchMode):
    """Fails at an operation that gives 64-bit floats."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return out


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lora"])
def test_no_operation_of_a_training_step_gives_64_bit_floats(optimizer):
    shape = {"n_layer": 2, "d_model": 64, "n_head": 4, "num_key_value_heads": 2, "d_ff": 96}
    model = Llama(ModelConfig(**shape, vocab_size=384))
    model = add_lora(model, 4, 8.0) if optimizer == "lora" else model
    cfg = PretrainConfig(optimizer="muon" if optimizer == "muon" else "adamw")
    optimizers, ids = make_optimizers(cfg, model, torch.device("cpu")), torch.arange(32).view(2, 16)
    with NoDoubles():
        loss, _ = next_token_loss(model.train(), {"ids": ids, "labels": ids})
        loss.backward()
        for each in optimizers:
            each.step()


# ---- the chain, on a Python without POSIX

PLATFORM = r"""
import builtins, fcntl, io, json, multiprocessing, os, sys, types, warnings

LACKING, MODULES, FOLDERS, NAMES = json.loads(os.environ["PLATFORM"])

def ours():
    "Does our own code ask? Python's library and the packages were built for this system."
    return os.path.dirname(sys._getframe(2).f_globals.get("__file__") or "") in FOLDERS

def hide(module, names):
    hidden = {name: module.__dict__.pop(name) for name in names if name in module.__dict__}

    def getattr(name):
        if name in hidden and not ours():
            return hidden[name]
        raise AttributeError(name)

    module.__getattr__ = getattr

for name, names in LACKING.items():
    hide(__import__(name), names)
multiprocessing.set_start_method("spawn")
real_import, real_open, real_os_open = builtins.__import__, io.open, os.open

def import_(name, *args, **kwargs):
    if name == "msvcrt" and ours():
        return msvcrt
    if name in MODULES and ours():
        raise ImportError(name)
    return real_import(name, *args, **kwargs)

def open_(file, *args, **kwargs):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file", file)
    assert not ours() or "encoding" in kwargs or "b" in str([*args, *kwargs.values()]), file
    return real_open(file, *args, **kwargs)

def os_open(path, *args, **kwargs):
    if ours() and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_os_open(path, *args, **kwargs)

def locking(descriptor, mode, count):
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
builtins.__import__, builtins.open, io.open, os.open = import_, open_, open_, os_open
# text that is read or written without encoding=
warnings.filterwarnings("error", category=EncodingWarning, module="^(" + "|".join(NAMES) + ")$")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of programs that see that platform, in an empty folder: (env, folder)."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(PLATFORM, encoding="utf-8")
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    lacking = {module: sorted(names) for module, names in LACKING.items()}
    platform = [lacking, sorted(MODULES), [*map(str, FOLDERS)], ["__main__", *modules]]
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONWARNDEFAULTENCODING": "1", "PLATFORM": json.dumps(platform)}
    return env, folder


def run(bare, *words):
    """Returns what `python WORDS` prints there."""
    words = [sys.executable, *words]
    done = subprocess.run(words, cwd=bare[1], env=bare[0], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_platform_lacks_what_it_should_and_locks_files_its_own_way(bare):
    """A module of ours sees no fork; of two who open a file the first holds it until it closes."""
    code = """
import os, types, lib.folders as folders
module = types.ModuleType("module")
module.__file__ = folders.__file__
exec("import os; forks = hasattr(os, 'fork')", module.__dict__)
first, second = (open("lock", "a+", encoding="utf-8") for _ in range(2))
print(module.forks, folders.lock_file(first), folders.lock_file(second))
first.close()
print(folders.lock_file(second))
"""
    assert run(bare, "-c", code).split() == ["False", "True", "False", "True"]


def test_from_raw_text_to_a_server_without_posix(bare, tiny_documents):
    folder = bare[1]
    texts = [f"{text}\n\n{n}" for n, text in enumerate(tiny_documents)] * 2
    write_rows(folder / "docs.jsonl", ({"text": text} for text in texts))
    rows = ({"prompt": f"What is {n}?", "response": str(n)} for n in range(40))
    write_rows(folder / "chats.jsonl", rows)
    size = ["--vocab_size=384", "--sequence_length=32"]
    data = "--input_path=docs.jsonl --output_dir=data --use_minhash=false --train_ratio=0.7".split()
    run(bare, ROOT / "data.py", *size, *data, "--num_workers=2")
    steps = "--max_steps=2 --warmup_steps=1 --save_steps=1 --eval_steps=2 --sample_tokens=2".split()
    steps += ["--batch_size=2", "--device=cpu"]
    shape = "--n_layer=1 --d_model=32 --n_head=2 --d_ff=64 --data_path=data --output_dir=base"
    run(bare, ROOT / "train.py", *size, *shape.split(), *steps)
    words = "--model_path=base --dataset_path=chats.jsonl --output_dir=sft --lora_r=2".split()
    run(bare, ROOT / "sft.py", *words, *steps, "--num_train_epochs=none")
    assert (folder / "sft" / "final" / "model.safetensors").is_file()
    model = ["--model_path=sft", "--device=cpu"]
    run(bare, ROOT / "sample.py", *model, "--chat", "--prompt=What?", "--max_new_tokens=4")
    run(bare, "-m", "tools.workspace", "status")
    words, log = [sys.executable, ROOT / "server.py", *model, "--port=0"], folder / "server.log"
    with open(log, "wb") as file:
        server = subprocess.Popen(words, cwd=folder, env=bare[0], stdout=file, stderr=file)
    try:
        while not (address := re.search(r"^http://\S+", log.read_text("utf-8"), re.M)):
            assert server.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        body = json.dumps({"prompt": "What is 7?", "max_new_tokens": 3}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address[0]}/generate", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["response"]
    finally:
        server.terminate()
        server.wait()
