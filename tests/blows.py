"""What tests do to a training from inside: a light room, because every process of a run imports it."""

import os
import shutil
import signal
import sys
import time

import torch

import model
import train
from lib import checkpoint

PHASES = {
    "forward": (model.Decoder, "forward"),
    "backward": (torch.Tensor, "backward"),
    "update": (train.State, "update"),
    "evaluation": (train, "evaluate"),
    "checkpoint": (train.State, "save"),
}


def strike(phase, passage, at, blow, rank=None):
    """Patches a phase: in its `passage`-th time, blow() comes at the `at`-th call or return of a function."""
    owner, name = PHASES[phase]
    original, left = getattr(owner, name), [passage]

    def patched(*args, **kwargs):
        left[0] -= 1
        if left[0] or rank not in (None, int(os.environ.get("RANK", 0))):
            return original(*args, **kwargs)
        count = [0]

        def profile(frame, event, argument):
            count[0] += 1
            if count[0] == at:
                blow()

        sys.setprofile(profile)
        try:
            return original(*args, **kwargs)
        finally:
            sys.setprofile(None)
            os.write(1, f"{phase} took {count[0]} events\n".encode())

    setattr(owner, name, patched)


def count_all():
    """Has every phase say, once, how many moments it has."""
    for phase in PHASES:
        strike(phase, 1, 0, None)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def die():
    """Ends the process as kill -9 would, but that it shows: with status 9."""
    os._exit(9)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def tell_torchrun():
    """Signals the parent, torchrun, and stays in the middle of things until torchrun has passed it on."""
    os.kill(os.getppid(), signal.SIGTERM)
    end = time.monotonic() + 60
    while (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < end
    ):
        time.sleep(0.01)


def fill(folder, spare):
    """Fills the disk of `folder` but for `spare` bytes."""
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(bytes(max(0, free - spare)))


def after_save(step, blow):
    """Has blow() come right after the checkpoint of that step."""
    save = train.State.save

    def patched(self, *args):
        save(self, *args)
        if self.step == step:
            blow()

    train.State.save = patched


def filled_while_saving(folder):
    """Fills the disk when a checkpoint has been found to fit and its first file is about to be written."""
    write = checkpoint.write_tensors

    def patched(value, path):
        fill(folder, 0)
        write(value, path)

    checkpoint.write_tensors = patched
