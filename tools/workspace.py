"""What lies in this folder - datasets, trainings, evaluations - and what is kept or thrown away.

    python -m tools.workspace status
    python -m tools.workspace newest --kind=sft
    python -m tools.workspace backup --output=backups/monday.tar.gz
    python -m tools.workspace clean | clean-checkpoints | clean-sessions

Everything is looked for where the commands put it, below the current folder: data/processed, checkpoints,
evaluation_results, sessions. No link is followed, neither to keep nor to delete what is behind it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lib.config import UserError, dispatch

DATA, CHECKPOINTS, RESULTS = Path("data/processed"), Path("checkpoints"), Path("evaluation_results")
SESSIONS, BACKUPS = Path("sessions"), Path("backups")


def command(*words):
    """Returns the words as what to type: with the Python that runs this, where that one is of this folder."""
    python = Path(sys.prefix) / ("Scripts" if os.name == "nt" else "bin") / "python"
    inside = python.is_relative_to(Path.cwd())
    return " ".join([str(python.relative_to(Path.cwd())) if inside else "python", *map(str, words)])


def read_json(path):
    """Returns the object in a file, {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def size_of(path):
    """Returns the bytes of a file or of all files in a folder; a link counts as itself."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


def shown_bytes(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


# ----------------------------------------------------------------------------------------------
# What is there


def datasets():
    """Returns the folders of prepared datasets, the newest first."""
    found = [path for path in DATA.glob("[!.]*/manifest.json") if path.is_file()]
    return [path.parent for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def describe_dataset(folder):
    """Returns what a dataset holds, its hashes compared where that is quick, or what is wrong with it."""
    from lib.folders import (  # numpy, which host.py may find missing
        VERIFY_BYTES,
        Shards,
        read_manifest,
    )

    try:
        manifest = read_manifest(folder)
        shards = [Shards(folder, split) for split, entries in manifest["splits"].items() if entries]
    except UserError as error:
        return f"  {folder}: BROKEN: {error}"
    documents, tokens = (
        sum(getattr(one, name) for one in shards) for name in ("documents", "tokens")
    )
    checked = all(one.tokens * one.dtype.itemsize <= VERIFY_BYTES for one in shards)
    state = "verified (sha256)" if checked else "sizes verified; too large to hash each time"
    held = f"{documents:,} documents, {tokens:,} tokens, vocabulary {manifest['vocab_size']:,}"
    return f"  {folder}: {held}, {state}"


def preparations():
    """Returns a line on each preparation that has not ended."""
    works = sorted(DATA.glob(".*.partial"))
    read = (read_json(work / "progress.json").get("documents") or 0 for work in works)
    names = (work.name.removeprefix(".").removesuffix(".partial") for work in works)
    told = "documents read; the command that began it goes on"
    return [f"  {DATA / name}: not complete, {count:,} {told}" for name, count in zip(names, read)]


class Training(NamedTuple):
    """One folder of a training and what its files say."""

    folder: Path
    kind: str  # pretrain, sft or dpo
    config: dict  # of its newest run.json
    last: dict  # every key that metrics.jsonl holds, its newest value
    when: float  # of the newest file that says something

    @property
    def problem(self):
        """What is wrong with final/, None if it is a whole model by its manifest's hashes."""
        from lib.checkpoint import (  # needs packages, whose want check-env is to tell
            FINAL_FILES,
            problem_with,
        )

        return problem_with(self.folder / "final", FINAL_FILES)


def newest_steps(folder):
    """Returns the step_* folders, newest first."""
    steps = [
        p
        for p in folder.glob("step_*")
        if p.name[5:].isdecimal() and p.is_dir() and not p.is_symlink()
    ]
    return sorted(steps, key=lambda p: -int(p.name[5:]))


def sound_step(folder):
    """Returns the newest checkpoint that a resume would take, None if there is none."""
    from lib.checkpoint import problem_with

    return next((step for step in newest_steps(folder) if problem_with(step) is None), None)


def read_training(folder):
    last, metrics = {}, folder / "metrics.jsonl"
    with contextlib.suppress(OSError):
        for line in metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(
                ValueError, TypeError
            ):  # a run that is being written, or was cut
                last |= json.loads(line)
    homes = [p / "run.json" for p in (*newest_steps(folder)[:1], folder / "final")]
    config = next(filter(None, map(read_json, homes)), {})
    kind = "dpo" if "beta" in config else "sft" if "dataset_path" in config else "pretrain"
    times = [p.stat().st_mtime for p in (metrics, *homes) if p.is_file()]
    return Training(folder, kind, config, last, max(times, default=0.0))


def trainings():
    """Returns every training below checkpoints/, the newest first."""
    marks = [p for name in ("metrics.jsonl", "final", "step_*") for p in CHECKPOINTS.rglob(name)]
    folders = {p.parent for p in marks if not any(part.startswith(".") for part in p.parts)}
    return sorted(map(read_training, folders), key=lambda one: -one.when)


def describe_training(one, problem):
    """Returns a line: how far a training is, how good, since when. problem: its Training.problem."""
    steps = newest_steps(one.folder)
    known = [one.last.get("step"), *(int(path.name[5:]) for path in steps[:1])]  # logged, and saved
    step = max((number for number in known if number is not None), default=None)
    goal, minutes = one.config.get("max_steps"), one.config.get("max_minutes")
    far = "no step logged" if step is None else f"step {step:,}" + (f" of {goal:,}" if goal else "")
    if minutes and "seconds" in one.last:
        far += f", {one.last['seconds'] / 60:.1f} of {minutes:g} minutes"
    elif not goal and one.config.get("num_train_epochs"):
        far += f", {one.config['num_train_epochs']:g} passes asked for"
    name = next((k for k in ("val_bits_per_byte", "val_loss") if one.last.get(k) is not None), None)
    good = f", {name} {one.last[name]:.4f}" if name else ""
    if problem is None:
        state = "complete"
    elif (one.folder / "final").exists():
        state = f"final/ is BROKEN: {problem}"
    else:
        state = "not complete"
        if not sound_step(one.folder):
            state += ", no checkpoint is whole" if steps else ", no checkpoint yet"
    when = time.strftime(", %Y-%m-%d %H:%M", time.localtime(one.when)) if one.when else ""
    return f"  {one.folder} ({one.kind}): {state}, {far}{good}{when}"


def evaluations():
    """Returns the folders of results below evaluation_results/, the newest first."""
    found = [p for p in RESULTS.rglob("results.json") if p.is_file()]
    return [p.parent for p in sorted(found, key=lambda p: -p.stat().st_mtime)]


def describe_evaluation(folder):
    results = read_json(folder / "results.json")
    model, text = (
        results.get(k) if isinstance(results.get(k), dict) else {} for k in ("model", "perplexity")
    )
    bits = text.get("bits_per_byte")
    measured = f"{bits:.4f} bits per byte" if isinstance(bits, float) else "perplexity not measured"
    return f"  {folder}: {model.get('path', 'not readable')}, {measured}"


def next_command(found, sound, seen):
    """Returns (what to do next, why). found: trainings, newest first; sound: the whole; seen: evaluations."""
    if not found and not datasets():
        return command("data.py", "configs/datasets/docstrings.json"), "there is no dataset yet"
    halves = [one for one in found if one not in sound and sound_step(one.folder)]
    if halves and (not sound or halves[0].when > sound[0].when):
        step, script = sound_step(halves[0].folder), halves[0].kind.replace("pretrain", "train")
        words = [f"{script}.py", step / "run.json", "--resume_from_checkpoint=auto"]
        if Path(halves[0].config.get("output_dir", "")).resolve() != halves[0].folder.resolve():
            words.append(f"--output_dir={halves[0].folder}")  # it was renamed, or copied
        return command(*words), f"{halves[0].folder} is not complete"
    if not sound:
        words = (
            ("train.py", "configs/demo.json", f"--data_path={datasets()[0]}") if datasets() else ()
        )
        return command(*words) if words else "make prepare", "there is no model yet"
    newest = sound[0]
    if newest.kind != "dpo":
        lessons = {"pretrain": ("sft", "an answer"), "sft": ("dpo", "the better of two answers")}
        script, nouns = lessons[newest.kind]
        file = Path("data/samples") / f"{script}_train.jsonl"
        words = (f"{script}.py", f"configs/{script}.json", f"--model_path={newest.folder}")
        words = (
            (*words, f"--dataset_path={file}")
            if file.exists()
            else ("data.py", "create_sample_datasets")
        )
        return command(*words), f"{newest.folder} has not learned to give {nouns}"
    paths = {Path(read_json(p / "results.json").get("model", {}).get("path", "")) for p in seen}
    if not paths & {newest.folder, newest.folder / "final"}:
        out = RESULTS / newest.folder.name
        return command(
            "eval.py", f"--model_path={newest.folder}", f"--output_dir={out}"
        ), "it was never evaluated"
    return command(
        "sample.py", "--chat", f"--model_path={newest.folder}"
    ), "all is there: talk to it"


@dataclass(frozen=True)
class StatusConfig:
    """Nothing to choose."""


def status(cfg=None):
    """What is in this folder, as it is on the disk, and what to do next: python -m tools.workspace status"""
    found, seen = trainings(), evaluations()
    problems = [one.problem for one in found]
    sound = [one for one, problem in zip(found, problems, strict=True) if problem is None]
    parts = {
        "datasets": [*map(describe_dataset, datasets()), *preparations()],
        "trainings": [describe_training(*pair) for pair in zip(found, problems, strict=True)],
        "evaluations": [describe_evaluation(folder) for folder in seen],
    }
    for name, lines in parts.items():
        print(name, *(lines or ["  none"]), sep="\n")
    todo, why = next_command(found, sound, seen)
    print(f"\nnext ({why}):\n  {todo}")


@dataclass(frozen=True)
class NewestConfig:
    """What is looked for."""

    # a model of this kind of training, or a dataset
    kind: Literal["any", "pretrain", "sft", "dpo", "data"] = "any"


def newest(kind="any"):
    """Returns the folder of the newest whole model of a kind, or of the newest dataset."""
    if kind == "data":
        folder = next(iter(datasets()), None)
        hint = f"no dataset in {DATA}; {command('data.py', 'configs/datasets/docstrings.json')} makes it"
    else:
        folder = next(
            (one.folder for one in trainings() if kind in (one.kind, "any") and not one.problem),
            None,
        )
        which = "" if kind == "any" else f"{kind} "
        hint = f"no complete {which}model in {CHECKPOINTS}; name one by MODEL_PATH, or train one: make demo"
    if folder is None:
        raise UserError(hint)
    return folder


def say_newest(cfg):
    """The newest whole model, or dataset, by name: python -m tools.workspace newest --kind=sft"""
    folder = newest(cfg.kind)
    print(f"using the newest: {folder}", file=sys.stderr)
    print(folder)


@dataclass(frozen=True)
class VocabConfig:
    """Whose vocabulary."""

    path: str  # a prepared dataset


def say_vocab(cfg):
    """The size of a dataset's vocabulary, which is its model's: python -m tools.workspace vocab PATH"""
    from lib.folders import read_manifest

    print(read_manifest(cfg.path.split(",")[0])["vocab_size"])


# ----------------------------------------------------------------------------------------------
# Kept in one file

OPENSSL = ("openssl", "enc", "-aes-256-cbc", "-pbkdf2", "-iter", "600000", "-salt")
OPENSSL += ("-pass", "env:BACKUP_PASSPHRASE")


@dataclass(frozen=True)
class BackupConfig:
    """Where to. A passphrase is taken from the environment alone, where no list of processes shows it."""

    output: str = ""  # the file, .tar.gz or, encrypted, .tar.gz.enc; empty = backups/ and the time


def worth_keeping():
    """Returns (files, links left out, warnings): presets, evaluations, of trainings final/, a step, logs.

    The step is the newest that is whole, else the newest; what is not whole is kept as it is, and told.
    """
    files, links, warnings = [], set(), []
    roots = [Path("configs"), RESULTS]
    for one in trainings():
        step = sound_step(one.folder) or next(iter(newest_steps(one.folder)), None)
        roots += [one.folder / "final", *filter(None, [step])]
        roots += [p for p in one.folder.iterdir() if p.name.startswith(("metrics", "curves"))]
        if (one.folder / "final").exists() and (problem := one.problem):
            warnings.append(f"{one.folder / 'final'} is BROKEN ({problem}) and kept as it is")
    for root in roots:
        below = [
            Path(folder) / name for folder, dirs, names in os.walk(root) for name in [*dirs, *names]
        ]
        for path in [root, *below]:
            link = next((p for p in [*reversed(path.parents), path] if p.is_symlink()), None)
            if link:
                links.add(link)
            elif path.is_file() and not any(part.startswith(".") for part in path.parts):
                files.append(path)
    return sorted(set(files)), sorted(links), warnings


@contextlib.contextmanager
def filtered(words, stdin, stdout):
    """Yields a program's end to write to, or to read from where stdin is a file; UserError if it fails."""
    try:
        process = subprocess.Popen(words, stdin=stdin, stdout=stdout)
    except FileNotFoundError:
        raise UserError(
            f"BACKUP_PASSPHRASE is set, but {words[0]} is not installed; install it, or unset that"
        ) from None
    whole = False
    with contextlib.suppress(
        BrokenPipeError, tarfile.ReadError
    ):  # it ended early, and its status says why
        with process:  # closes the pipe and waits
            yield process.stdin if stdin is subprocess.PIPE else process.stdout
        whole = True
    if process.returncode or not whole:
        raise UserError(f"{words[0]} failed with status {process.returncode}; nothing was kept")


def write_tar(files, target, secret):
    """Writes files to an open file, encrypted if `secret`. Returns {name: sha256} of what went in."""
    sums = {}
    pipe = filtered(OPENSSL, subprocess.PIPE, target) if secret else contextlib.nullcontext(target)
    with (
        pipe as sink,
        tarfile.open(fileobj=sink, mode="w|gz", dereference=True) as tar,
    ):  # of hard links too
        for path in files:
            with packable(path) as file:
                reader = Hashing(file)
                tar.addfile(tar.gettarinfo(fileobj=file, arcname=path.as_posix()), reader)
            sums[path.as_posix()] = reader.sum.hexdigest()
    return sums


def packable(path):
    """Opens a file to pack it; UserError if it is no longer there, or not to be read."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        why = "gone since the packing began, as old checkpoints are while a training runs; start it again"
        raise UserError(f"{path}: {why}") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from None


class Hashing:
    """A file that hashes what is read of it."""

    def __init__(self, file):
        self.file, self.sum = file, hashlib.sha256()

    def read(self, count):
        data = self.file.read(count)
        self.sum.update(data)
        return data


def read_tar(path, secret):
    """Returns {name: sha256} of what a backup holds."""
    with path.open("rb") as file:
        pipe = (
            filtered((*OPENSSL, "-d"), file, subprocess.PIPE)
            if secret
            else contextlib.nullcontext(file)
        )
        with pipe as source, tarfile.open(fileobj=source, mode="r|gz") as tar:
            return {
                entry.name: hashlib.file_digest(tar.extractfile(entry), "sha256").hexdigest()
                for entry in tar
            }


def backup(cfg):
    """Presets, models, newest checkpoints and evaluations in one verified file: python -m tools.workspace backup

    With BACKUP_PASSPHRASE in the environment it is encrypted by openssl (AES-256, PBKDF2).
    """
    secret = os.environ.get("BACKUP_PASSPHRASE")
    if secret == "":
        raise UserError(
            "BACKUP_PASSPHRASE is empty; set it, or unset it for a backup that anyone can read"
        )
    name = time.strftime("%Y%m%d_%H%M%S") + ".tar.gz" + (".enc" if secret else "")
    path = Path(cfg.output) if cfg.output else BACKUPS / name
    if path.exists():
        raise UserError(f"{path}: exists; name another --output")
    files, links, warnings = worth_keeping()
    print(f"packing {shown_bytes(sum(map(size_of, files)))} into {path}", flush=True)
    part = path.with_name(f".tmp-{path.name}")
    target = writable(part)
    try:
        with target:
            sums = write_tar(files, target, secret)
        if read_tar(part, secret) != sums:
            raise UserError(f"{path}: what was written is not what was read; nothing was kept")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    for warning in warnings:
        print(f"warning: {warning}")
    for link in links:
        print(f"left out: {link}, a link")
    print(
        f"{path}: {len(sums):,} files, {shown_bytes(path.stat().st_size)}, read back and compared"
    )
    print(f"to unpack: {unpack(path, secret)}")


def writable(path):
    """Opens a file to write it, in a folder made if need be; UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as problem:
        if problem.errno == errno.ENOSPC:
            raise
        why = f"cannot be written ({problem.strerror})"
        raise UserError(f"{path.parent}: {why}; name another --output") from None


def unpack(path, secret):
    """Returns the command that unpacks a backup into the folder one stands in."""
    path = shlex.quote(str(path))
    return f"{' '.join(OPENSSL)} -d -in {path} | tar -xz" if secret else f"tar -xzf {path}"


# ----------------------------------------------------------------------------------------------
# Thrown away


@dataclass(frozen=True)
class CleanConfig:
    """Whether to ask."""

    yes: Literal["", "1"] = ""  # 1 = do not ask


def refuse_if_in_use():
    """UserError if a training holds one of the folders below checkpoints/."""
    from lib.folders import lock_file  # numpy, as above

    for lock in CHECKPOINTS.rglob("run.lock"):
        with lock.open(encoding="utf-8") as handle:
            held = not lock_file(handle)
            handle.seek(0)
            if held:
                raise UserError(
                    f"{lock.parent} is in use by process {handle.read().strip()}; stop it first"
                )


def inside(folder):
    """Returns what lies in a folder; of a folder that is a link, the link."""
    return [folder] if folder.is_symlink() else sorted(folder.glob("*"))


def throw_away(paths, cfg):
    """Lists `paths` with their sizes, asks, and deletes them; of a link only the link."""
    paths = [path for path in paths if path.exists() or path.is_symlink()]
    if not paths:
        print("nothing to delete")
        return
    for path in paths:
        note = "  (a link; what it points to stays)" if path.is_symlink() else ""
        print(f"  {shown_bytes(size_of(path)):>12}  {path}{note}", flush=True)  # before an error
    if not cfg.yes:
        if not sys.stdin.isatty():
            raise UserError(
                "deleting needs a yes and there is no terminal to ask; YES=1 (--yes=1) says it"
            )
        if input("delete these? type yes: ").strip().lower() != "yes":
            print("nothing was deleted")
            return
    for path in paths:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    print("deleted")


def clean(cfg):
    """Delete caches of Python and of the tools, and what killed backups left: python -m tools.workspace clean"""
    caches = [Path(name) for name in ("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis")]
    halves = sorted(BACKUPS.glob(".tmp-*"))
    throw_away([*caches, *sorted(Path(".").glob("[!.]*/__pycache__")), *halves], cfg)


def clean_checkpoints(cfg):
    """Delete every training, its models included: python -m tools.workspace clean-checkpoints"""
    refuse_if_in_use()
    throw_away(inside(CHECKPOINTS), cfg)


def clean_sessions(cfg):
    """Delete the logs of sessions and the toys of session-debug: python -m tools.workspace clean-sessions"""
    throw_away(inside(SESSIONS), cfg)


COMMANDS: dict[str, tuple[Callable, type]] = {
    "status": (status, StatusConfig),
    "newest": (say_newest, NewestConfig),
    "vocab": (say_vocab, VocabConfig),
    "backup": (backup, BackupConfig),
    "clean": (clean, CleanConfig),
    "clean-checkpoints": (clean_checkpoints, CleanConfig),
    "clean-sessions": (clean_sessions, CleanConfig),
}


if __name__ == "__main__":
    dispatch(COMMANDS, sys.argv[1:], __doc__)
