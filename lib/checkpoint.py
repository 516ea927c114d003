"""Folders that are whole or absent: written hidden, hashed, renamed; verified before they are read.

A checkpoint is a model folder with `train_state/`, `run.json` (the configuration, itself a preset)
and `manifest.json` (size and sha256 of every file), which is written last and deleted first. What
a model or an optimizer is, train.State knows: it fills the folders.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import safetensors

from lib.config import UserError, fsync, read_object, refusing, save_config
from lib.folders import file_problem, file_sha256, lock_file

CHECKPOINT_FORMAT = 1  # a newer one is refused, not guessed at
WEIGHT_FILES = {"model.safetensors", "adapter_model.safetensors"}  # a folder has one of them
FINAL_FILES = {"run.json"}
CHECKPOINT_FILES = FINAL_FILES | {"train_state/state.pt", "train_state/rng_00000.pt"}


def seal(folder):
    """Writes manifest.json, last of all: name, size and sha256 of every file in `folder`."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        entries[path.relative_to(folder).as_posix()] = entry
    manifest = json.dumps({"format": CHECKPOINT_FORMAT, "files": entries}, indent=1) + "\n"
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    for path in (folder / "manifest.json", *(p for p in folder.iterdir() if p.is_dir()), folder):
        fsync(path)


def problem_with(folder, needed=CHECKPOINT_FILES):
    """Returns None if `folder` is sound and lists the files `needed`, else what is wrong."""
    if not (folder / "manifest.json").is_file():
        return "no manifest.json: it was never finished" if folder.is_dir() else "no such folder"
    try:
        manifest = read_object(folder / "manifest.json")
        if manifest["format"] != CHECKPOINT_FORMAT:
            return f"format {manifest['format']!r:.40}, this program reads {CHECKPOINT_FORMAT}"
        files = manifest["files"]
        if not (files.keys() >= needed and files.keys() & WEIGHT_FILES):
            return "manifest.json does not list a whole checkpoint"
        for name, entry in files.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"illegal file name {name!r} in manifest.json"
            if problem := file_problem(folder, name, entry["bytes"], str(entry["sha256"])):
                return problem
    except (OSError, UserError, KeyError, TypeError, AttributeError, ValueError):
        return "manifest.json is not readable"


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def checkpoints(output_dir):
    """Returns the step_* folders, newest first by number: step_10000 before step_2000."""
    folders = [p for p in Path(output_dir).glob("step_*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def check_unused(cfg):
    """Raises UserError if a fresh start is asked for where a run already lies."""
    used = checkpoints(cfg.output_dir) or (Path(cfg.output_dir) / "final").exists()
    if used and cfg.resume_from_checkpoint is None and not cfg.plan:
        remedy = "continue it with --resume_from_checkpoint=auto, or choose another --output_dir"
        raise UserError(f"{cfg.output_dir} already holds a run; {remedy}")


def find_checkpoint(cfg, say):
    """Returns the folder to resume from, None for a fresh start."""
    wanted, steps = cfg.resume_from_checkpoint, checkpoints(cfg.output_dir)
    finished = (Path(cfg.output_dir) / "final").exists()
    if wanted is None:
        check_unused(cfg)
        return None
    if wanted != "auto":
        folder = Path(wanted)
        if problem := problem_with(folder):
            remedy = "name a step_* folder, or auto for the newest sound one"
            raise UserError(f"{wanted}: not a sound checkpoint: {problem}; {remedy}")
        if (finished or steps) and not any(map(folder.samefile, steps[:1])):  # auto's choice, later
            raise UserError(f"{cfg.output_dir} already holds a run; choose another --output_dir")
        return folder
    problems = []
    for folder in steps:
        if (problem := problem_with(folder)) is None:
            for line in problems:
                say(f"warning: {line}; going back to {folder.name}")
            return folder
        problems.append(f"{folder.name}: {problem}")
    if problems or finished:
        why = "; ".join(problems) or "only final/ is there; choose another --output_dir"
        raise UserError(f"{cfg.output_dir}: no sound checkpoint to resume from: {why}")
    return None


def write_tensors(value, path):
    """Writes tensors and builtins; raises OSError if the disk is full or failing."""
    import torch  # here and below: programs that only look at folders need not wait for it

    with open(path, "wb") as file:  # given a path, torch raises a RuntimeError of its own
        torch.save(value, file)


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
    """Yields a hidden folder to fill; then adds run.json and manifest and renames it to `folder`.

    Every rank must enter. A `folder` that exists is replaced: it is broken, or of this very step.
    Whatever fails, nothing is left of the hidden folder; what a disk refuses is a UserError.
    """
    hidden = folder.with_name(f".tmp-{folder.name}")
    fresh = {"resume_from_checkpoint": None}  # so `train.py FOLDER/run.json` begins at step 0
    fresh |= {"allow_config_change": False, "allow_world_size_change": False}
    errors, remedy = (OSError, safetensors.SafetensorError), "earlier checkpoints are untouched"
    try:
        with refusing(errors, f"{folder}: not written", remedy):
            if world.rank == 0:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir()
            world.barrier()
            yield hidden
            world.barrier()
            if world.rank == 0:
                save_config(cfg, hidden / "run.json", _world_size=world.size, **fresh)
                seal(hidden)
                remove_folder(folder)
                os.replace(hidden, folder)
                fsync(folder.parent)
            world.barrier()
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_folder(folder):
    """Deletes a checkpoint, manifest first: half a checkpoint must not look like a whole one."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(output_dir, keep, state):
    """Deletes all checkpoints up to this step but the best and the last `keep`.

    Later ones do not count: find_checkpoint found them broken and went back.
    """
    for folder in [p for p in checkpoints(output_dir) if step_of(p) <= state.step][keep:]:
        if step_of(folder) != state.best_step:
            remove_folder(folder)


@contextlib.contextmanager
def locked(output_dir, world):
    """Holds `output_dir` for this run; UserError naming the process that already does."""
    if world.rank:
        world.barrier()  # until rank 0 has made the folder
        yield
        return
    folder = Path(output_dir)
    with refusing(OSError, f"output_dir {output_dir}", "choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+", encoding="utf-8", newline="\n")
    with lock:
        if not lock_file(lock):
            lock.seek(0)
            raise UserError(f"{output_dir} is in use by process {lock.read().strip()}")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        # what was killed just before its rename is renamed, other hidden leftovers are deleted
        for hidden in (*folder.glob(".tmp-step_*"), folder / ".tmp-final"):
            target = folder / hidden.name.removeprefix(".tmp-")
            if problem_with(hidden) is None and problem_with(target):
                remove_folder(target)
                os.replace(hidden, target)
            shutil.rmtree(hidden, ignore_errors=True)
        world.barrier()
        yield
