"""The server under load: throughput of 1, 8 and 16 streams, 200 clients at once, slow clients, a
long soak.

    python benchmarks/server_load.py   all of it, preset tiny with random weights
    python benchmarks/server_load.py --items=speed --model_path=checkpoints/sft --rounds=5
    python benchmarks/server_load.py --items=crowd,slow,soak --requests=10000

The server is a process of its own, the clients are this one's threads: on two cores they take their
share of both. `speed` alternates between numbers of streams; each stream asks again and again for
--tokens greedy tokens (server-sent events, or whole answers with --plain), and a figure is the
median over rounds of all tokens by the wall clock. `crowd` counts statuses, and answers that differ
from the same request alone: it draws from few tokens, as rounding may decide between two of many
that are almost equally likely. `slow` holds 500 clients that stall and times /health beside them.
`soak` compares memory, threads and file handles of the server after the first tenth of its requests
and after the last. One JSON line is printed.
"""

import argparse
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ITEMS = ("speed", "crowd", "slow", "soak")


def random_model(folder, preset):
    """Writes a model of a preset's shape, weights and words random. Returns `folder`."""
    import torch

    from corpus.tokenizer import train_tokenizer
    from lib.config import configure
    from model import Llama, ModelConfig, save_model

    cfg, chance = configure(ModelConfig, [str(preset)], foreign_keys=True), random.Random(0)
    words = [
        "".join(chance.choices("etaoinshrdlucmfw", k=chance.randint(3, 9))) for _ in range(60_000)
    ]
    texts = (" ".join(chance.choices(words, k=200)) for _ in range(2_000))
    folder.mkdir()
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", cfg.vocab_size)
    torch.manual_seed(0)
    save_model(Llama(cfg).eval(), folder)
    tokenizer.save(folder, cfg.sequence_length)
    return folder


class Server:
    """`python server.py` as a process, and what its clients do."""

    def __init__(self, folder, log, **knobs):
        words = [
            f"--{name}={value}"
            for name, value in ({"model_path": folder, "port": 0} | knobs).items()
        ]
        command = [sys.executable, str(ROOT / "server.py"), *words]
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        line = self.process.stdout.readline()
        assert line, Path(log).read_text()
        self.port = int(line.split()[0].rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0

    def send(self, fields=None, path="/v1/completions"):
        """Returns a socket with a request sent on it: a POST of `fields`, or a GET without."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=600)
        head = f"{'GET' if fields is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
        body = b"" if fields is None else json.dumps(fields).encode()
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(head.encode() + b"\r\n" + body)
        return sock

    def ask(self, fields=None, path="/v1/completions"):
        """Returns (status, body) of a request; 0 if the connection was reset."""
        try:
            with self.send(fields, path) as sock:
                parts = []
                while part := sock.recv(1 << 16):
                    parts.append(part)
        except OSError as problem:
            return 0, str(problem).encode()
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def resources(self):
        """Memory in MB, threads, file handles."""
        place = Path(f"/proc/{self.process.pid}")
        status = dict(
            line.split(":\t", 1)
            for line in (place / "status").read_text().splitlines()
            if ":\t" in line
        )
        memory = int(status["VmRSS"].split()[0]) / 1024
        return {
            "memory_mb": round(memory, 1),
            "threads": int(status["Threads"]),
            "handles": len(os.listdir(place / "fd")),
        }


def together(count, work):
    """Runs work(number) in `count` threads that begin at once."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- speed


def throughput(server, streams, tokens, seconds, stream):
    """Tokens per second of `streams` clients that ask for `seconds`, to the end of their last
    answers.
    """
    counts, begin = [0] * streams, time.perf_counter()

    def client(number):
        fields = {
            "prompt": [1, 100 + number] * 8,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }
        fields |= {"stream_options": {"include_usage": True}} if stream else {}
        while time.perf_counter() - begin < seconds:
            status, body = server.ask(fields)
            assert status == 200, body
            last = body.split(b"\n\n")[-3].removeprefix(b"data: ") if stream else body
            counts[number] += json.loads(last)["usage"]["completion_tokens"]

    together(streams, client)
    return sum(counts) / (time.perf_counter() - begin)


def speed(server, args):
    streams = [int(number) for number in args.streams.split(",")]
    throughput(server, max(streams), 8, 1, True)  # warm
    rounds = {number: [] for number in streams}
    for turn in range(args.rounds):
        for number in streams if turn % 2 else reversed(streams):
            rounds[number].append(
                throughput(server, number, args.tokens, args.seconds, not args.plain)
            )
    figures = {}
    for number, values in rounds.items():
        middle = statistics.median(values)
        ratio = middle / statistics.median(rounds[streams[0]])
        extent = [round(min(values), 1), round(max(values), 1)]
        figures[number] = {
            "tokens_per_second": round(middle, 1),
            "range": extent,
            "ratio": round(ratio, 2),
        }
    return figures


# ---- many, slow, long


def crowd(server, args):
    """200 clients at once, every second streamed; afterwards each served request, alone."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.5, "top_k": 20, "seed": 3},
    ]
    asked = [
        {"prompt": [1, 100 + n % 30, 200], "max_tokens": 8 + n % 20, "stream": n % 2 == 0}
        | kinds[n % 3]
        for n in range(200)
    ]
    answers = [None] * 200
    begin = time.perf_counter()
    together(200, lambda number: answers.__setitem__(number, server.ask(asked[number])))
    seconds = time.perf_counter() - begin
    different = [
        number
        for number, (status, body) in enumerate(answers)
        if status == 200 and text_of(body) != text_of(server.ask(asked[number])[1])
    ]
    statuses = dict(Counter(status for status, _ in answers))
    return {"statuses": statuses, "different": len(different), "seconds": round(seconds, 2)}


def text_of(body):
    events = body.split(b"\n\n")[:-2] if body.startswith(b"data: ") else [body]
    choices = (json.loads(event.removeprefix(b"data: "))["choices"] for event in events)
    return "".join(choice["text"] for found in choices for choice in found)


def slow(server, args):
    """500 clients that send half of something and then nothing; beside them /health, a hundred
    times.
    """
    with ExitStack() as stack:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
        for number, sock in enumerate(held):
            stack.enter_context(sock)
            sock.sendall(
                [b"", b"GET /hea", b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Le"][
                    number % 3
                ]
            )
        times = []
        for _ in range(100):
            begin = time.perf_counter()
            assert server.ask(path="/health")[0] == 200
            times.append(1000 * (time.perf_counter() - begin))
            time.sleep(0.02)
        middle = round(statistics.median(times), 1)
        return {
            "health_ms": {"median": middle, "worst": round(max(times), 1)},
            **server.resources(),
        }


def soak(server, args):
    """Many requests of every kind from 8 clients: right, wrong, streamed, scored, abandoned."""
    kinds = [
        {"prompt": [1, 100], "max_tokens": 3},
        {"prompt": "once", "max_tokens": 2, "stream": True},
        {"prompt": [1, 100, 200], "max_tokens": 1, "echo": True, "logprobs": 1},
        {"prompt": [[1], [1, 100]], "max_tokens": 2, "n": 2},
        {"prompt": "once", "temperature": "hot"},
        {"prompt": [1, 100], "max_tokens": 50, "stream": True, "leave": True},
    ]
    statuses, lock, numbers = Counter(), threading.Lock(), iter(range(args.requests))
    seen = {}

    def client(_):
        while (number := next(numbers, None)) is not None:
            fields = dict(kinds[number % len(kinds)])
            if fields.pop("leave", False):
                with server.send(fields) as sock:
                    sock.recv(1)
                status = "left"
            else:
                status, _ = server.ask(fields)
            with lock:
                statuses[status] += 1
                if sum(statuses.values()) == args.requests // 10:
                    seen["after a tenth"] = server.resources()

    begin = time.perf_counter()
    together(8, client)
    seconds = time.perf_counter() - begin
    time.sleep(2)
    return {
        "statuses": dict(statuses),
        "seconds": round(seconds, 1),
        **seen,
        "at the end": server.resources(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default=",".join(ITEMS))
    parser.add_argument(
        "--model_path", help="a model folder; by default random weights in the preset's shape"
    )
    parser.add_argument("--preset", default=ROOT / "configs/tiny.json")
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--plain", action="store_true", help="whole answers instead of streams")
    args = parser.parse_args()
    result = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as place:
        folder = args.model_path or random_model(Path(place) / "model", args.preset)
        for item in args.items.split(","):
            assert item in ITEMS, item
            with Server(folder, Path(place) / f"{item}.log", slots=16) as server:
                result[item] = {"speed": speed, "crowd": crowd, "slow": slow, "soak": soak}[item](
                    server, args
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
