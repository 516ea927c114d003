"""What a training survives besides a crash: signals that ask it to stop, and memory that runs out.

Both happen to one rank and must lead to the same decision on all of them. So the ranks ask each other, at
places where none is waiting for anything else: before gradients are summed, and between the batches of a
validation.
"""

import contextlib
import signal

import torch

from lib.config import UserError
from lib.runtime import free_memory, out_of_memory, rng_state, set_rng_state


class StopSignals:
    """While entered, SIGINT or SIGTERM asks for a stop at the next step; a SIGINT after that interrupts."""

    asked = 0  # the signal's number

    @property
    def status(self):
        """The exit status as shells count it; if another rank was asked, that of torchrun's SIGTERM."""
        return 128 + (self.asked or signal.SIGTERM)

    def __enter__(self):
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


class Stopped(Exception):
    """Some rank was asked to stop in the middle of a Walk."""


def unless_out_of_memory(compute):
    """Returns compute(), or None if memory ran out; the traceback, which keeps tensors alive, is dropped."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
    return None


FREE_SOME = "free some, and continue with --resume_from_checkpoint=auto"


@contextlib.contextmanager
def enough_memory(when, remedy=FREE_SOME):
    """Turns an allocator's failure into a UserError: out of memory `when`, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        raise UserError(f"out of memory {when}; checkpoints are untouched; {remedy}") from None


# ---- a step


def attempt(state, world, compute, *args):
    """Returns compute(state, *args), or None if memory ran out on any rank.

    Then it is as if the step had not begun: gradients are cleared and random numbers put back.
    """
    numbers = rng_state(world.device)
    shares = unless_out_of_memory(lambda: compute(state, *args))
    # no rank waits for another's gradients yet, so all of them can give up together
    if not world.sum(shares is None)[0]:
        return shares
    shares = None
    for p in state.parameters:
        p.grad = torch.zeros_like(p) if state.fixed_gradients else None
    free_memory(world.device)
    set_rng_state(numbers, world.device)
    return None


def smaller_batches(cfg, loader, accumulation, state, world):
    """Halves the loader's batch_size, down to a divisor of the step's rows. Returns the accumulation.

    A step keeps its rows, so tokens per step and learning stay what they were. Raises UserError if one row
    is too much already.
    """
    rows, size = loader.batch_size * accumulation, loader.batch_size
    if size == 1:
        off = "" if cfg.gradient_checkpointing else "--gradient_checkpointing, "
        raise UserError(
            f"out of memory at step {state.step + 1:,} with one row in a micro-batch; use {off}a shorter "
            "--sequence_length or a smaller model (--plan shows what takes how much)"
        )
    loader.batch_size = next(n for n in range(size // 2, 0, -1) if rows % n == 0)
    now = rows // loader.batch_size
    world.say(
        f"out of memory at step {state.step + 1:,}: from here micro-batches of {loader.batch_size} rows "
        f"instead of {size}, {now} a step instead of {accumulation}; a step's rows and loss stay the same"
    )
    return now


def smaller_update(cfg, state):
    """Returns what helps if memory runs out in an update, where the batch does not matter."""
    muon = cfg.optimizer == "adamw" and len(state.parameters) == len(list(state.model.parameters()))
    less = "--optimizer=muon, whose state is smaller, or " if muon else ""
    return f"smaller batches would not help: use {less}a smaller model (--plan shows what takes how much)"


# ---- held-out rows


class Walk:
    """A pass over rows that nothing is learned from, `rows` at a time on each rank; `what` is its name.

    After every batch the ranks ask each other. If one was asked to stop, all raise Stopped, because torchrun
    waits for half a minute only; if memory ran out on one, all go on with half as many rows.
    """

    def __init__(self, what, rows, world, stop=None):
        self.what, self.rows, self.world, self.stop = what, rows, world, stop

    def each(self, work, stream, count):
        """Yields (first row, work(batch)) for this rank's share of the first `count` rows of `stream`."""
        at, world = 0, self.world
        while at < count:
            first = at + world.rank * self.rows
            found = self._share(work, stream, first, count)
            failed, stopping = world.sum(found is None, bool(self.stop and self.stop.asked))
            if stopping:
                raise Stopped
            if failed:
                self._halve()
                continue
            if first < count:
                yield first, found
            at += world.size * self.rows

    def total(self, work, stream, count, parts):
        """Returns the sums over all ranks of the `parts` numbers that work(batch) returns."""
        sums = [0] * parts
        for _, found in self.each(work, stream, count):
            sums = [total + part for total, part in zip(sums, found, strict=True)]
        return self.world.sum(*sums)

    def _share(self, work, stream, first, count):
        """Returns work(this rank's batch), () if no row is left for it, None if memory ran out."""
        end = min(first + self.rows, count)
        return unless_out_of_memory(lambda: work(stream.rows(first, end))) if first < end else ()

    def _halve(self):
        free_memory(self.world.device)
        if self.rows == 1:
            raise UserError(
                f"out of memory in {self.what} with one row at a time; "
                "use a shorter --sequence_length or a smaller model"
            )
        self.rows //= 2
        self.world.say(
            f"out of memory in {self.what}: from here {self.rows} rows at a time instead of {2 * self.rows}; "
            "what it finds stays the same"
        )
