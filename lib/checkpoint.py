"""Folders that are whole or absent: written beside, hashed, renamed into place; verified before being read.

A checkpoint is a model folder with `train_state/`, `run.json` (the configuration, itself a preset) and
`manifest.json` (size and sha256 of every file), which is written last and deleted first. This room does not
know what a model or an optimizer is: train.State fills the folders.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import safetensors

from lib.config import UserError, save_config
from lib.folders import file_sha256, lock_file

FORMAT = 1  # of a checkpoint; a newer one is refused, not guessed at


def fsync(path):
    """Forces a file or folder to the disk, where the system can."""
    with contextlib.suppress(
        OSError
    ):  # Windows cannot open folders, nor flush a file opened for reading
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def seal(folder):
    """Writes manifest.json, last of all: name, size and sha256 of every file in `folder`."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        size, digest = path.stat().st_size, file_sha256(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
    manifest = json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n"
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    for path in (folder / "manifest.json", *(p for p in folder.iterdir() if p.is_dir()), folder):
        fsync(path)


WEIGHTS = {"model.safetensors", "adapter_model.safetensors"}  # one of them
FINAL_FILES = {"run.json"}
CHECKPOINT_FILES = FINAL_FILES | {"train_state/state.pt", "train_state/rng_00000.pt"}


def problem_with(folder, needed=CHECKPOINT_FILES):
    """Returns None if `folder` is sound and lists the files `needed`, else what is wrong with it."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r:.40}, this program reads {FORMAT}"
        files = {
            k: (int(entry["bytes"]), str(entry["sha256"])) for k, entry in manifest["files"].items()
        }
        if not (files.keys() >= needed and files.keys() & WEIGHTS):
            return "manifest.json does not list a whole checkpoint"
        problems = (problem_with_file(folder, name, *expected) for name, expected in files.items())
        return next(filter(None, problems), None)
    except FileNotFoundError:
        return "no manifest.json: it was never finished"
    except OSError as problem:
        return f"not readable ({problem.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not readable"


def problem_with_file(folder, name, size, digest):
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        return f"illegal file name {name!r} in manifest.json"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, expected {size}"
    found = file_sha256(path)
    if found != digest:
        return f"{name}: checksum mismatch (expected {digest[:8]}.., got {found[:8]}..)"
    return None


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def checkpoints(output_dir):
    """Returns the step_* folders of `output_dir`, newest first by number: step_10000 before step_2000."""
    found = [p for p in Path(output_dir).glob("step_*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def check_unused(cfg):
    """Raises UserError if a fresh start is asked for where a run already lies."""
    there = checkpoints(cfg.output_dir) or (Path(cfg.output_dir) / "final").exists()
    if there and cfg.resume_from_checkpoint is None and not cfg.plan:
        raise UserError(
            f"{cfg.output_dir} already holds a run; continue it with --resume_from_checkpoint=auto, "
            "or choose another --output_dir"
        )


def find_checkpoint(cfg, say):
    """Returns the folder to resume from, None for a fresh start; UserError rather than a silent restart."""
    wanted, there = cfg.resume_from_checkpoint, checkpoints(cfg.output_dir)
    finished = (Path(cfg.output_dir) / "final").exists()
    if wanted is None:
        check_unused(cfg)
        return None
    if wanted != "auto":
        folder = Path(wanted)
        problem = problem_with(folder)
        if problem:
            remedy = "name a step_* folder, or auto for the newest sound one"
            raise UserError(f"{wanted}: not a sound checkpoint: {problem}; {remedy}")
        if (there or finished) and not (there and there[0].samefile(folder)):
            newest = (
                there[0].name if there else "final"
            )  # a later auto would go on from there, not from here
            raise UserError(f"{cfg.output_dir} already holds {newest}; choose another --output_dir")
        return folder
    bad = []
    for folder in there:
        problem = problem_with(folder)
        if problem is None:
            for line in bad:
                say(f"warning: {line}; going back to {folder.name}")
            return folder
        bad.append(f"{folder.name}: {problem}")
    if bad or finished:
        why = "; ".join(bad) or "only final/ is there; choose another --output_dir"
        raise UserError(f"{cfg.output_dir}: no sound checkpoint to resume from: {why}")
    return None


def write_tensors(value, path):
    """Writes tensors and builtins; raises OSError if the disk is full or failing."""
    import torch  # here, as in read_tensors: whoever only looks at folders need not wait for it

    try:
        torch.save(value, path)
    except (
        RuntimeError
    ) as problem:  # torch's words for it: "unexpected pos 64 vs 0", "iostream error"
        if "alloc" in str(problem):  # memory is full, not the disk
            raise
        raise OSError(errno.EIO, f"disk full or failing: {problem!s:.60}") from None


def read_tensors(path):
    """Returns what torch.save wrote to `path`; only tensors and builtins are ever loaded."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises six different types for a foreign file
        culprit = re.search(r"GLOBAL (\S+)", str(problem))  # the code that a pickle wanted to run
        what = f"contains {culprit[1]}" if culprit else f"{problem!r:.200}".splitlines()[0]
        raise UserError(f"{path}: {what}: refused, not a plain checkpoint file") from None


@contextlib.contextmanager
def whole_folder(folder, cfg, world):
    """Yields a hidden folder to fill, then adds run.json and the manifest and renames it to `folder`.

    Every rank must enter. A `folder` that exists is replaced: it is one that find_checkpoint found broken, or
    this very step's. Raises UserError if the disk is full or failing, and leaves nothing of it then.
    """
    tmp = folder.with_name(f".tmp-{folder.name}")
    try:
        if world.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
        world.barrier()
        yield tmp
        world.barrier()
        if world.rank == 0:
            write_run_json(cfg, world, tmp)
            seal(tmp)
            remove(folder)
            os.replace(tmp, folder)
            fsync(folder.parent)
        world.barrier()
    except (OSError, RuntimeError, MemoryError, safetensors.SafetensorError) as problem:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(problem, (RuntimeError, MemoryError)):
            raise
        why = getattr(problem, "strerror", None) or problem
        raise UserError(
            f"{folder}: not written ({why}); earlier checkpoints are untouched"
        ) from None


def write_run_json(cfg, world, folder):
    """Writes the resolved configuration, itself a preset: `train.py FOLDER/run.json` runs it from step 0."""
    fresh = {
        "resume_from_checkpoint": None,
        "allow_config_change": False,
        "allow_world_size_change": False,
    }
    save_config(dataclasses.replace(cfg, **fresh), folder / "run.json")
    values = json.loads((folder / "run.json").read_text(encoding="utf-8")) | {
        "_world_size": world.size
    }
    (folder / "run.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def remove(folder):
    """Deletes a checkpoint, manifest first: one half deleted must not look like a whole one."""
    with contextlib.suppress(FileNotFoundError):
        (folder / "manifest.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)


def prune(output_dir, keep, state):
    """Deletes all checkpoints up to now but the best and the last `keep`.

    Later ones do not count: find_checkpoint found them broken and went back.
    """
    for folder in [p for p in checkpoints(output_dir) if step_of(p) <= state.step][keep:]:
        if step_of(folder) != state.best_step:
            remove(folder)


@contextlib.contextmanager
def locked(output_dir, world):
    """Holds `output_dir` for this run; UserError naming the process that already does."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "run.lock"
        handle = open(lock, "a+", encoding="utf-8") if world.rank == 0 else None  # noqa: SIM115 - held while we train
    except OSError as problem:
        raise UserError(
            f"output_dir {output_dir}: {problem.strerror}; choose another --output_dir"
        ) from None
    if handle:
        held = not lock_file(handle)
        handle.seek(0)
        if held:
            raise UserError(f"{output_dir} is in use by process {handle.read().strip()}")
        handle.truncate()
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        for leftover in folder.glob(".tmp-step_*"):
            place = folder / leftover.name.removeprefix(".tmp-")
            if problem_with(leftover) is None and problem_with(
                place
            ):  # killed just before the rename
                remove(place)
                os.replace(leftover, place)
        for leftover in (*folder.glob(".tmp-step_*"), folder / ".tmp-final"):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield
    finally:
        if handle:
            handle.close()
