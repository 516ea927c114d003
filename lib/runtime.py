"""The machine of a training: ranks, stop signals, device, precision, random numbers, memory, GPUs.

Data parallelism is done by hand: the weights are broadcast once, and in every step the gradients
are summed while the backward pass goes on. There is no wrapper around the model, and so no prefix
on the names of its parameters.
"""

import contextlib
import ctypes
import os
import random
import re
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from lib.config import DTYPES, UserError, read_object


class Stopped(Exception):
    """Raised by `World.batches` on every rank when one was asked to stop."""


@dataclass
class World:
    """Which rank this process is, of how many, and the sums that data parallelism is made of."""

    rank: int
    size: int
    device: torch.device
    stop_signal: int = 0  # SIGINT or SIGTERM once it has come, see `stop_signals`

    def sum(self, *numbers):
        """Returns the sums of `numbers` over all ranks, in float64. Waits for every rank."""
        if self.size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: no wait for the GPU
        dist.all_reduce(totals)
        return totals.tolist()

    def broadcast(self, tensors):
        """Overwrites `tensors` with rank 0's."""
        for t in tensors if self.size > 1 else ():
            dist.broadcast(t.detach(), 0)

    def barrier(self):
        self.sum(0)

    def batches(self, stream, rows, batch_size):
        """Yields (first row, batch): this rank's share of the first `rows` rows of `stream`.

        Raises Stopped on all ranks if one was asked to stop: torchrun waits only half a minute.
        """
        for start in range(0, rows, self.size * batch_size):
            first = start + self.rank * batch_size
            if first < rows:
                yield first, stream.rows(first, min(first + batch_size, rows))
            if self.sum(self.stop_signal > 0)[0]:
                raise Stopped

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


class Gradients:
    """Gradients whose sums over ranks travel while the backward pass still makes others.

    With several ranks, and on a GPU, they lie in flat buckets of about `size` numbers and are
    zeroed, never replaced: a bucket is sent as it is, a CUDA graph adds to them where they lie. The
    head's come first, as in the backward pass; every rank sends the buckets in this order.
    """

    def __init__(self, parameters, world, size=1 << 23):
        self.fixed = world.size > 1 or world.device.type == "cuda"
        self.buckets, self.counts, self.missing, self.sums = [], [], [], []
        groups, total = {}, 0
        for p in reversed(parameters if self.fixed else ()):
            groups.setdefault(total // size, []).append(p)
            total += p.numel()
        for number, group in enumerate(groups.values()):
            sizes = [p.numel() for p in group]
            bucket = torch.zeros(sum(sizes), device=world.device)
            for p, gradient in zip(group, bucket.split(sizes)):
                p.grad = gradient.view_as(p)
                if world.size > 1:  # once p.grad has all that a backward pass adds to it
                    p.register_post_accumulate_grad_hook(partial(self._note, number))
            if world.size > 1:
                self.buckets.append(bucket)
                self.counts.append(len(group))

    def send_early(self, last):
        """Has the next backward pass, if the step's last, send each bucket that becomes whole."""
        self.missing = list(self.counts) if last else []

    def _note(self, number, parameter):
        if self.missing:
            self.missing[number] -= 1
            self._send()

    def _send(self):
        while len(self.sums) < len(self.buckets) and not self.missing[len(self.sums)]:
            self.sums.append(dist.all_reduce(self.buckets[len(self.sums)], async_op=True))

    def sum(self):
        """Replaces every gradient by its sum over ranks, sent early or now."""
        self.missing = [0] * len(self.buckets)  # a parameter that a loss leaves out is never noted
        self._send()
        for work in self.sums:
            work.wait()
        self.missing, self.sums = [], []


@contextlib.contextmanager
def stop_signals(world):
    """While entered, SIGINT or SIGTERM sets world.stop_signal; a SIGINT after that interrupts."""

    def note(number, frame):
        world.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def open_world(cfg):
    """Yields the World that torchrun's environment describes, or a world of one rank.

    What can end every training becomes a UserError: memory that runs out, a rank that is gone.
    """
    number = lambda name, default: int(os.environ.get(name, default))
    rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    if size > 1 and "MASTER_ADDR" not in os.environ:  # set by a cluster's shell, or left over
        missing = "but MASTER_ADDR is not set; start with torchrun, or unset it"
        raise UserError(f"WORLD_SIZE is {size}, {missing}")
    device = choose_device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    if device.type == "cpu":  # torchrun says how many of the ranks share this machine
        tune_cpu(min(size, number("LOCAL_WORLD_SIZE", size)))
    if size > 1:  # counts and decisions travel through gloo, gradients on GPUs through nccl
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first CUDA matmul
        torch.use_deterministic_algorithms(True)
        # torch would fill every empty tensor with NaN; nothing here reads what it has not written
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield World(rank, size, device)
    except (RuntimeError, MemoryError) as problem:
        # torch has a type for it on CUDA only
        words = "(?i)out of memory|can't allocate memory|not enough memory|bad_alloc|ALLOC_FAILED"
        if isinstance(problem, MemoryError) or re.search(words, str(problem)):
            why = f"out of memory; checkpoints are untouched; {less_memory(cfg)}"
            raise UserError(why) from None
        if size > 1 and re.search("(?i)gloo|nccl|connection", str(problem)):
            why = f"whose own message says why ({problem!s:.80})"
            raise UserError(f"rank {rank} lost another rank, {why}") from None
        raise
    finally:
        if size > 1:
            dist.destroy_process_group()


# ---- device and precision


def choose_device(wanted):
    """Returns the torch.device for auto, cpu, cuda or mps; UserError where it does not exist."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [name for name in available if available[name]] + ["cpu"]
    wanted = devices[0] if wanted == "auto" else wanted
    if wanted not in devices:
        missing = f"this machine has no {wanted.upper()} device"
        raise UserError(f"device={wanted}: {missing}; use --device=cpu")
    return torch.device(wanted)


def tune_cpu(ranks=1):
    """Applies settings that measurably help on a CPU, which `ranks` ranks share.

    They divide the cores, unless OMP_NUM_THREADS says how many threads to use (under torchrun a 1
    is torchrun's own). glibc keeps large blocks: page faults cost as much as the matmuls.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, cores // ranks))
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def choose_dtype(wanted, device):
    """Returns (dtype of matmuls, reason)."""
    if wanted == "fp16" and device.type != "cuda":
        raise UserError("dtype=fp16 needs CUDA; use --dtype=bf16 or --dtype=fp32")
    flags = getattr(torch.cpu, "get_capabilities", dict)()
    units = flags.get("avx512_bf16") or flags.get("amx_bf16")
    if wanted != "auto":
        slow = wanted == "bf16" and device.type == "cpu" and not units
        reason = "as asked" + ", slower than fp32: no 16-bit units on this cpu" * slow
        return getattr(torch, DTYPES[wanted]), reason
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "the GPU multiplies bf16 natively"
        return torch.float16, "the GPU has fp16 units but no bf16"
    if units:
        return torch.bfloat16, "the CPU multiplies bf16 natively"
    return torch.float32, "no 16-bit units on this cpu"


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """Returns the batch's arrays as tensors on `device`, copied while a GPU works; no counts."""
    tensors = {k: torch.from_numpy(v) for k, v in batch.items() if isinstance(v, np.ndarray)}
    if device.type == "cuda":
        return {k: v.pin_memory().to(device, non_blocking=True) for k, v in tensors.items()}
    return {k: v.to(device) for k, v in tensors.items()}


# ---- random numbers


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all devices


def rng_state(device):
    """Returns every global generator's state in builtins and tensors, for weights_only=True."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    state["torch"] = torch.get_rng_state()
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


# ---- memory


def memory_used(device):
    """Returns the peak memory in bytes: of a CUDA device, else of this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


def less_memory(cfg):
    """Returns how a run of `cfg` goes on in less memory: the end of an error message."""
    rows, size = cfg.batch_size * cfg.gradient_accumulation_steps, cfg.batch_size // 2
    while size and rows % size:  # a step keeps its rows: nothing changes in what is learned
        size -= 1
    ways = [f"--batch_size={size} --gradient_accumulation_steps={rows // size}"] if size else []
    ways += [] if cfg.gradient_checkpointing else ["--gradient_checkpointing"]
    resume = f"continue with --resume_from_checkpoint=auto and {' or '.join(ways)}; else "
    less = "use a shorter --sequence_length or a smaller model (--plan shows what takes how much)"
    return resume * bool(ways) + less


# ---- GPUs


def datasheets():
    """Returns configs/gpus/datasheets.json, {name: GPU}, as namespaces of its keys and units."""
    entries = read_object(Path(__file__).parents[1] / "configs/gpus/datasheets.json")
    return {name: SimpleNamespace(**entry) for name, entry in entries.items() if name[0] != "_"}


def peak_flops(device):
    """Returns the dense bf16 FLOP/s of the GPU at hand, or None if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpus = [gpu for gpu in datasheets().values() if re.search(rf"\b{gpu.label}\b", name)]
    return max(gpus, key=lambda gpu: len(gpu.label)).flops if gpus else None
