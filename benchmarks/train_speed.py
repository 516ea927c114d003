"""Training on a CPU: our fit's step against transformers' LlamaForCausalLM with its own loss.

    python benchmarks/train_speed.py   tiny: 4 x 256 and 4 x 512, memory at 8 x 512
    python benchmarks/train_speed.py --items=speed --lengths=256 --rounds=9
    python benchmarks/train_speed.py --sizes=small --programs=ours_fp32,transformers_fp32_tuned
    python benchmarks/train_speed.py --programs=ours_fp32,ours_fp32_plain,ours_fp32_onednn

A program's name says what it is, word by word. `ours` goes through open_world, announce, State,
clip and update of train.py; `transformers` is the straight loop over model(input_ids, labels).loss.
Then the precision. `compile`: torch.compile. `muon`: instead of AdamW. `tuned` gives transformers
our allocator and thread settings, `plain` takes them from ours. `active`: OpenMP's threads spin
while they wait. `onednn` multiplies float32 with oneDNN instead of MKL. `math`: attention as
explicit matmuls in ours, which is what 16 bits take.

Weights and batches are the same for all, and so are learning rate, betas, clipping and what decays.
Each program is a process of its own that waits for its turn; turns alternate, in reverse order
every second round. A turn is --steps optimizer steps: forward, backward, clipping, optimizer. The
first one warms up and compiles, and its losses have to be transformers' (AdamW: the first to 1e-4
in fp32, 2e-2 in bf16, the others to 2e-2, for Adam's first updates are signs, of rounding too):
else it is not the same training, and the program ends. Figures are medians over rounds, with the
least and the most.

MFU is over the best matrix product (2048 x 2048 x 2048, into a buffer) that this machine gave
between those turns; FLOPs are 6 N + 12 L C T a token, head counted, attention in full. Memory is
what three steps add, at their peak, to a process that has imported what it needs and built its
model. One JSON line is printed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train
from lib import runtime as machine
from lib.config import configure
from model import Llama, ModelConfig, flops_per_token, load_weights, next_token_loss, save_model
from tools.plan import forward_backward

CPU = torch.device("cpu")
NATIVE = (
    str(machine.choose_dtype("auto", CPU)[0])[6:]
    .replace("float32", "fp32")
    .replace("bfloat16", "bf16")
)
OURS = ("", "_compile", "_muon", "_muon_compile")
THEIRS = ("", "_compile", "_tuned", "_tuned_compile", "_tuned_active_compile")
DEFAULT = [
    name
    for dtype in dict.fromkeys(("fp32", NATIVE))
    for name in (*(f"ours_{dtype}{k}" for k in OURS), *(f"transformers_{dtype}{k}" for k in THEIRS))
]
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000"}  # as sample.py sets it
LOOP = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}


def shape(size, length):
    cfg = configure(ModelConfig, [str(ROOT / f"configs/{size}.json")], foreign_keys=True)
    return replace(cfg, sequence_length=length)


def rows_of(cfg, rows, step):
    """Returns the batch of one step: ids, the likelier the smaller, so that there is something to
    learn.
    """
    draws = np.random.default_rng(step).random((rows, cfg.sequence_length))
    ids = (cfg.vocab_size * draws**4).astype(np.int64)
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[
        :, 1:
    ]  # transformers' loss shifts likewise, and the last position predicts nothing
    return {"ids": ids, "labels": labels, "count": int((labels >= 0).sum())}


# ---- the programs: each returns a function from a batch to the loss before its optimizer step


def ours(words, cfg, folder, until_end):
    knobs = {"optimizer": "muon" if "muon" in words else "adamw", "compile": "compile" in words}
    loop = train.LoopConfig(device="cpu", dtype=words[1], **knobs, **LOOP)
    if "plain" in words:
        machine.tune_cpu = lambda ranks: None
    world = until_end.enter_context(machine.open_world(loop))
    torch.set_float32_matmul_precision("medium" if "onednn" in words else "highest")
    model = Llama(cfg).train()
    load_weights(model, folder)
    dtype, _ = train.announce(loop, model, world)
    if "math" in words:
        model.use_attention("math")
    state = train.State(loop, model, world, dtype)

    def step(batch):
        loss = forward_backward(state, batch, next_token_loss, batch["count"], CPU, dtype)
        state.update(loop.learning_rate, state.clip(loop.max_grad_norm), batch["count"])
        return loss.item()

    return step


def transformers(words, cfg, folder, until_end):
    from transformers import LlamaForCausalLM

    if "tuned" in words:
        machine.tune_cpu()
    torch.set_float32_matmul_precision("medium" if "onednn" in words else "highest")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False).train()
    named = list(model.named_parameters())
    decayed = {id(p) for name, p in named if p.ndim == 2 and "embed" not in name}
    groups = [
        {"params": [p for _, p in named if (id(p) in decayed) is yes], "weight_decay": decay}
        for yes, decay in ((True, LOOP["weight_decay"]), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LOOP["learning_rate"], betas=(0.9, 0.95), fused=True)
    if "compile" in words:
        model.compile()

    def step(batch):
        ids = torch.from_numpy(batch["ids"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=words[1] == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LOOP["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def products(dtype):
    """Returns a function that gives the best FLOP/s of a matrix product in `dtype` among a few."""
    machine.tune_cpu()
    a, b, out = (torch.randn(2048, 2048, dtype=dtype) for _ in range(3))

    def best():
        seconds = []
        for precision in ("highest", "medium") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            for _ in range(4):
                began = time.perf_counter()
                torch.mm(a, b, out=out)
                seconds.append(time.perf_counter() - began)
        return 2 * 2048**3 / min(seconds)

    return best


def build(program, cfg, folder, until_end):
    words = program.split("_")
    if "compile" in words:
        import torch._inductor.compile_fx  # noqa: F401 - an import, not memory of a step

    return {"ours": ours, "transformers": transformers}[words[0]](words, cfg, folder, until_end)


def work(args, until_end):
    """The child: says "ready", then takes a turn at each line, and answers it with one of JSON."""
    if args.program.startswith("peak"):
        best = products(torch.bfloat16 if args.program == "peak_bf16" else torch.float32)
    else:
        cfg = shape(args.sizes, int(args.lengths))
        step = build(args.program, cfg, args.folder, until_end)
    print("ready", flush=True)
    done = 0
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        if args.program.startswith("peak"):
            answer = {"flops": best()}
        else:
            batches = (rows_of(cfg, args.rows, done + i) for i in range(args.steps))
            answer = {"losses": [step(batch) for batch in batches]}
            done += args.steps
        spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print("turn " + json.dumps(answer | spent), flush=True)


def memory_of(args, until_end):
    """Returns the MB that three steps add at their peak to what the process holds once its model is
    built.
    """
    cfg = shape(args.sizes, int(args.lengths))
    step = build(args.program, cfg, args.folder, until_end)
    with contextlib.suppress(OSError):  # Linux: the peak so far is forgotten
        Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    for number in range(3):
        step(rows_of(cfg, args.rows, number))
    return round((peak_resident() - before) / 1e6)


def resident():
    """Returns the bytes this process holds now; where the system does not say, its peak."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return machine.memory_used(CPU)


def peak_resident():
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return machine.memory_used(CPU)


# ---- what is measured


def command(program, size, length, rows, folder, args):
    own = {"program": program, "sizes": size, "lengths": length, "rows": rows, "folder": folder}
    return [
        sys.executable,
        __file__,
        *(f"--{k}={v}" for k, v in own.items()),
        f"--steps={args.steps}",
    ]


class Child:
    """A program as a process that waits for its turn."""

    def __init__(self, program, words):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        env = os.environ | (SPINNING if "active" in program else {})
        self.program, self.process = program, subprocess.Popen(words, text=True, env=env, **pipes)
        self._read("ready")

    def _read(self, word):
        for line in self.process.stdout:  # announce tells what was chosen
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"error: {self.program} ended before its turn; what it said is above")

    def turn(self):
        time.sleep(0.2)  # no thread of another program spins any more
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self._read("turn "))

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def speed(size, length, folder, args):
    """Returns {program: its figures} of all programs at `--rows` x length, and of the matrix
    products.
    """
    peaks = [f"peak_{dtype}" for dtype in sorted({name.split("_")[1] for name in args.programs})]
    names = [*args.programs, *peaks]
    children = {n: Child(n, command(n, size, length, args.rows, folder, args)) for n in names}
    turns = {name: [] for name in children}
    for number in range(args.rounds + 1):  # the first warms up
        for name in names[:: 1 if number % 2 else -1]:
            turns[name].append(children[name].turn())
    for child in children.values():
        child.end()
    result = {p: max(turn["flops"] for turn in turns.pop(p)) for p in peaks}
    check_losses({name: done[0]["losses"] for name, done in turns.items()})
    per_turn, flops = args.rows * length * args.steps, flops_per_token(shape(size, length))
    for name, (first, *done) in turns.items():
        rates = [per_turn / turn["seconds"] for turn in done]
        middle = statistics.median(rates)
        result[name] = {
            "tokens/s": [round(f(rates)) for f in (statistics.median, min, max)],
            "MFU": round(flops * middle / result[f"peak_{name.split('_')[1]}"], 3),
            "CPU ms a token": round(1000 * statistics.median(t["cpu"] for t in done) / per_turn, 3),
            "first turn, seconds": round(first["seconds"], 1),
            "loss, first and last": [
                round(first["losses"][0], 4),
                round(done[-1]["losses"][-1], 4),
            ],
        }
    return result | {peak: round(result[peak] / 1e9) for peak in peaks}


def check_losses(losses):
    """Ends the program where AdamW's first losses are not transformers' (without these, the
    first's).
    """
    base = next((name for name in losses if name.startswith("transformers")), next(iter(losses)))
    for name in losses:
        first, *others = (abs(a - b) for a, b in zip(losses[name], losses[base], strict=True))
        bound = 2e-2 if "bf16" in name + base else 1e-4
        if "muon" not in name and not (first <= bound and max(others, default=0) <= 2e-2):
            raise SystemExit(
                f"error: {name} is not the training of {base}: {losses[name]}, {losses[base]}"
            )


def memory(size, length, folder, args):
    """Returns {program: MB} at twice `--rows`, one process after the other."""
    figures = {}
    for name in args.programs:
        words = command(name, size, length, 2 * args.rows, folder, args) + ["--items=memory"]
        env = os.environ | (SPINNING if "active" in name else {})
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env)
        figures[name] = int(done.stdout.splitlines()[-1])
    return figures


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="speed,memory")
    parser.add_argument("--sizes", default="tiny")
    parser.add_argument("--lengths", default="256,512", help="memory is measured at the longest")
    parser.add_argument(
        "--rows", type=int, default=4, help="of a batch; memory takes twice as many"
    )
    parser.add_argument("--programs", default=",".join(DEFAULT))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a turn")
    parser.add_argument("--program", help=argparse.SUPPRESS)  # the child's side
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.program:
        with contextlib.ExitStack() as until_end:
            if args.items == "memory":
                print(memory_of(args, until_end))
            else:
                work(args, until_end)
        return
    args.programs, result = args.programs.split(","), {}
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes.split(","):
            folder, lengths = Path(place) / size, sorted(map(int, args.lengths.split(",")))
            folder.mkdir()
            torch.manual_seed(0)
            save_model(Llama(shape(size, lengths[-1])), folder)
            if "speed" in args.items:
                for length in lengths:
                    key = f"{size}, {args.rows} x {length}"
                    result[key] = speed(size, length, folder, args)
                    print(json.dumps({key: result[key]}), file=sys.stderr, flush=True)
            if "memory" in args.items:
                name = f"{size}, {2 * args.rows} x {lengths[-1]}, added MB"
                result[name] = memory(size, lengths[-1], folder, args)
    settings = {"rounds": args.rounds, "steps": args.steps, "torch": torch.__version__}
    print(
        json.dumps(result | settings | {"machine": platform.processor(), "cores": os.cpu_count()})
    )


if __name__ == "__main__":
    main()
