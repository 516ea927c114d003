"""Programs without the seconds that Python, torch and our modules take to be imported.

A server imports them once, before it has any thread, and forks for whoever asks; a fork becomes
`python WORDS` with its client's folder, environment and standard streams. `Fork` asks from within
Python. `python()` is a script for programs that start programs: it asks, passes signals on, and
ends as its fork ended.
"""

import functools
import json
import os
import select
import signal
import socket
import struct
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SERVERS = []  # ours, once it runs; its stdin ends with us, and so does it


@functools.cache
def start_server():
    """Starts the server. Returns its socket's path."""
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="warm")
    script, address = os.path.join(folder, "python"), os.path.join(folder, "socket")
    with open(script, "w", opener=functools.partial(os.open, mode=0o755)) as file:
        file.write(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} ask {address} "$@"\n')
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = os.environ | dict.fromkeys(threads, "1")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    words = [sys.executable, __file__, "serve", address]
    SERVERS.append(subprocess.Popen(words, env=env, **pipes))
    assert SERVERS[0].stdout.readline() == b"ready\n"
    return address


def python():
    """Returns the path of a Python that has imported everything."""
    return os.path.join(os.path.dirname(start_server()), "python")


class Fork:
    """`python WORDS` as a fork of the server; files: its standard input, output and error.

    It does not outlive this object. exitcode: None until `join` has seen its end, then what
    subprocess calls returncode.
    """

    def __init__(self, words, env, files, address=None):
        self.conn, self.exitcode = socket.socket(socket.AF_UNIX), None
        self.conn.connect(address or start_server())
        socket.send_fds(self.conn, [b"+"], files)
        self.conn.sendall(json.dumps([words, os.getcwd(), dict(env)]).encode() + b"\n")
        self.pid = self.receive()

    def receive(self):
        return struct.unpack("i", self.conn.recv(4, socket.MSG_WAITALL))[0]

    def join(self, seconds=None):
        """Waits for its end, at most so many seconds."""
        if self.exitcode is None and select.select([self.conn], [], [], seconds)[0]:
            self.exitcode = self.receive()

    def is_alive(self):
        self.join(0)
        return self.exitcode is None

    def kill(self):
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def ask(address, *words):
    """Has `python WORDS` run by the server, and ends as that ended."""
    fork = Fork(words, os.environ, [0, 1, 2], address)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(fork.pid, number))
    fork.join()
    end_with(fork.exitcode)


def end_with(status):
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


# ---- the server


def serve(address):
    """Forks at every request, until stdin ends. Returns in a program only: its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
            shutil.rmtree(os.path.dirname(address))
            os.killpg(0, signal.SIGKILL)
        conn, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return supervise(conn)
        conn.close()


def supervise(conn):
    """Forks the program and tells its client how that ends. Returns in the program: its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, *_ = socket.recv_fds(conn, 1, 3)
    with conn.makefile() as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        conn.close()
        return *request, files

    def kill_with_client():
        conn.recv(1)  # returns when the client is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    for file in files:
        os.close(file)
    conn.sendall(struct.pack("i", pid))
    threading.Thread(target=kill_with_client, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        conn.sendall(struct.pack("i", status))
    os._exit(0)


def become(words, folder, env, files):
    """Makes this process what `python WORDS` would be, and runs it."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    text = {"encoding": "utf-8", "closefd": False}
    sys.stdin, sys.stdout = os.fdopen(0, **text), os.fdopen(1, "w", **text)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", **text)
    sys.stdout.reconfigure(write_through=bool(env.get("PYTHONUNBUFFERED")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv, first = words, os.path.dirname(os.path.realpath(words[0]))
    if words[0] in ("-c", "-m"):
        sys.argv, first = words[1:], folder
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.modules.pop(words[1], None)  # a program, no module that is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(words[0], run_name="__main__")


def end(program):
    """Runs program() and ends the process as the interpreter would, but frees no object."""
    status = 0
    try:
        program()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        status = 120
    end_with(status)


if __name__ == "__main__" and sys.argv[1] == "ask":
    ask(*sys.argv[2:])
elif __name__ == "__main__":
    import atexit
    import contextlib
    import gc
    import importlib
    import runpy
    import shutil
    import threading
    import types
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    folders = (root, root / "lib", root / "corpus", root / "tools")
    files = [path for folder in folders for path in folder.glob("*.py")]
    modules = [".".join(path.relative_to(root).with_suffix("").parts) for path in files]
    modules += ["torch._dynamo", "torch.distributed.run", "ftfy", "matplotlib.figure"]
    for name in [*modules, "pytest", "tests.runs"]:
        importlib.import_module(name)
    del sys.path[0]
    gc.freeze()  # so that collecting garbage in a fork does not copy all of this
    request, sys.executable = (
        serve(sys.argv[2]),
        os.path.join(os.path.dirname(sys.argv[2]), "python"),
    )
    end(functools.partial(become, *request))
