"""Windows, macOS and Linux run the same code: for what a platform lacks there is a fallback.

The proof: the chain from raw text to a server runs on a Python whose POSIX has been taken away.
"""

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

MODULES = "crypt curses fcntl grp msvcrt pty pwd readline resource syslog termios tty".split()
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
LACKING = {module: names.split() for module, names in LACKING.items()}

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
    optimizers, ids = make_optimizers(cfg, model), torch.arange(32).view(2, 16)
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
    platform = [LACKING, MODULES, [*map(str, FOLDERS)], ["__main__", *modules]]
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
