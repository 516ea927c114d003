"""Processes without the two or three seconds that Python, torch and our rooms take to be imported.

A server imports them once, before any thread of its own runs, and forks for whoever asks. A fork
becomes what `python WORDS` would be: a process with arguments, folder, environment, standard
streams, signals, limits and an exit status like any. `Fork` asks for one from within Python. For
programs that start programs there is `python()`, the path of a shell script that runs this file as
a client: it hands over its streams, passes signals on, is killed together with its fork, and ends
as that ended.
"""

import atexit
import functools
import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
AT_START = ("PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONUTF8")  # what a fork would read too late
SERVERS = []  # ours, once it runs; it ends when we do, and takes its folder along


@functools.cache
def start_server():
    """Starts the server, once. Returns its folder."""
    folder = tempfile.mkdtemp(prefix="warm")
    path, address = os.path.join(folder, "python"), os.path.join(folder, "socket")
    words = shlex.join([sys.executable, "-IS", __file__, "ask", address, sys.executable])
    with open(path, "w") as file:
        file.write(f'#!/bin/sh\nexec {words} "$@"\n')
    os.chmod(path, 0o755)
    env = os.environ | dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "start_new_session": True,
        "env": env,
    }
    SERVERS.append(subprocess.Popen([sys.executable, __file__, "serve", address, path], **pipes))
    assert SERVERS[0].stdout.readline() == b"ready\n"
    return folder


def python():
    """Returns the path of a Python that has imported everything, or without fork() a plain one."""
    return os.path.join(start_server(), "python") if hasattr(os, "fork") else sys.executable


class Fork:
    """`python WORDS` as a fork of the server; `files` are its standard input, output and error.

    It does not outlive this object, nor this process. `exitcode` is None until `join` has seen its
    end, then what subprocess would call its returncode.
    """

    def __init__(self, words, env, files):
        self.conn, self.exitcode = socket.socket(socket.AF_UNIX), None
        self.conn.connect(os.path.join(start_server(), "socket"))
        send_request(self.conn, words, env, False, [0, 1, 2], [file.fileno() for file in files])
        self.pid = number_from(self.conn)

    def join(self, seconds=None):
        """Waits for its end, at most so many seconds."""
        if self.exitcode is None and select.select([self.conn], [], [], seconds)[0]:
            self.exitcode = number_from(self.conn)
            self.conn.close()

    def is_alive(self):
        self.join(0)
        return self.exitcode is None

    def kill(self):
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


# ---- between client and server


def send_request(conn, words, env, unbuffered, numbers, files):
    """Asks for `python WORDS` in the working folder, with `files` open under those numbers."""
    socket.send_fds(conn, [b"+"], files)
    conn.sendall(json.dumps([words, os.getcwd(), dict(env), unbuffered, numbers]).encode() + b"\n")


def number_from(conn):
    """Returns what the server tells next: first the fork's pid, then how it ended."""
    return struct.unpack("i", conn.recv(4, socket.MSG_WAITALL))[0]


def ask(address, plain, *words):
    """Has `python WORDS` run by the server, or becomes a plain one where that would not be the
    same.
    """
    rest = words[
        next((n for n, word in enumerate(words) if word not in ("-u", "-B")), len(words)) :
    ]
    known = rest and (os.path.isfile(rest[0]) or (rest[0] in ("-c", "-m") and len(rest) > 1))
    files = sorted(n for n in map(int, os.listdir("/dev/fd")) if n < 3 or is_inherited(n))
    conn = socket.socket(socket.AF_UNIX)
    try:
        if not known or files[:3] != [0, 1, 2] or any(name in os.environ for name in AT_START):
            raise OSError
        conn.connect(address)
    except OSError:
        os.execv(plain, [plain, *words])
    unbuffered = "-u" in words[: -len(rest)] or bool(os.environ.get("PYTHONUNBUFFERED"))
    send_request(conn, rest, os.environ, unbuffered, files, files)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, frame: conn.sendall(bytes([number])))
    number_from(conn)  # its pid
    status = number_from(conn)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_inherited(number):
    try:
        return os.get_inheritable(number)
    except OSError:  # the listing's own, closed by now
        return False


# ---- the server


def serve(address):
    """Forks at every request, until stdin ends. Returns in a fork only: what it is to run."""
    import selectors

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector, forks = selectors.DefaultSelector(), {}
    for file in (sys.stdin, listener, woken):
        selector.register(file, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                conn, _ = listener.accept()
                pid, request = fork(conn)
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for file in (listener, woken, wake, conn, selector, *forks.values()):
                        file.close()
                    return request
                if pid:
                    forks[pid] = conn
                    selector.register(conn, selectors.EVENT_READ, pid)
                    tell(conn, pid)
            elif key.fileobj is woken:
                woken.recv(4096)
                reap(forks, selector)
            elif key.fileobj is sys.stdin:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(os.path.dirname(address))
                os._exit(0)
            elif key.data in forks:  # else it was reaped a moment ago
                hear(key.fileobj, key.data, selector)


def fork(conn):
    """Returns the fork's pid, or None if nothing was asked, and in the fork 0; and there the
    request.
    """
    _, received, *_ = socket.recv_fds(conn, 1, 250)
    text = conn.makefile().readline()
    pid = os.fork() if text else None
    if pid == 0:
        return 0, [*json.loads(text), received]
    for number in received:
        os.close(number)
    return pid, None


def tell(conn, number):
    with contextlib.suppress(OSError):  # the client was killed
        conn.sendall(struct.pack("i", number))


def reap(forks, selector):
    """Tells the clients of the forks that ended how they did."""
    while forks and (found := os.waitpid(-1, os.WNOHANG))[0]:
        conn = forks.pop(found[0])
        with contextlib.suppress(KeyError):  # `hear` did it
            selector.unregister(conn)
        tell(conn, os.waitstatus_to_exitcode(found[1]))
        conn.close()


def hear(conn, pid, selector):
    """Passes signals on; a client that is gone was killed, and so is its fork."""
    try:
        numbers = conn.recv(64)
    except OSError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)
    if not numbers:
        selector.unregister(conn)


def become(words, folder, env, unbuffered, files, received):
    """Makes this process what `python WORDS` would be, with open `files` of those numbers, and
    runs it.
    """
    aside = [
        fcntl.fcntl(number, fcntl.F_DUPFD, 200) for number in received
    ]  # out of each other's way
    for number in received:
        os.close(number)
    for number, file in zip(files, aside):
        os.dup2(file, number)
        os.close(file)
    manner = {"encoding": sys.stdin.encoding, "errors": sys.stdin.errors, "closefd": False}
    sys.stdin, sys.stdout = os.fdopen(0, **manner), os.fdopen(1, "w", **manner)
    sys.stderr = os.fdopen(2, "w", **manner | {"buffering": 1, "errors": "backslashreplace"})
    sys.stdout.reconfigure(write_through=unbuffered)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_executable(sys.executable)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if words[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # a program, no module that is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
    else:
        module.__file__ = os.path.abspath(words[0])
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        sys.argv = words
        code = importlib.machinery.SourceFileLoader("__main__", module.__file__).get_code(
            "__main__"
        )
    exec(code, module.__dict__)


def end(run):
    """Ends the process with run() as the interpreter would, less the freeing of every object."""
    status = 0
    try:
        run()
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.closed or sys.stdout.flush()
    except OSError:
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__" and sys.argv[1] == "ask":
    ask(*sys.argv[2:])
elif __name__ == "__main__":
    import contextlib
    import fcntl
    import gc
    import importlib.machinery
    import multiprocessing
    import runpy
    import shutil
    import threading
    import types
    from pathlib import Path

    room = Path(__file__).resolve().parent.parent
    sys.path[0] = str(room)
    for name in [
        *(path.stem for path in room.glob("*.py")),
        *(
            f"{path.parent.name}.{path.stem}"
            for d in ("lib", "corpus", "tools")
            for path in (room / d).glob("*.py")
        ),
        *("torch._dynamo", "torch.distributed.run", "ftfy", "datasketch", "matplotlib.figure"),
        *("pytest", "tests.runs"),  # of what tests have their forks do
    ]:
        importlib.import_module(name)
    del sys.path[0]
    gc.freeze()  # what the forks needn't copy by looking at it
    request, sys.executable = serve(sys.argv[2]), sys.argv[3]
    end(functools.partial(become, *request))
