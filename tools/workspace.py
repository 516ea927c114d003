"""What is in this folder and on this machine, and what may be kept or deleted.

    python -m tools.workspace status
    python -m tools.workspace backup --output=backups/monday.tar.gz

The commands look below the current folder where the programs write: data/processed, checkpoints,
evaluation_results, sessions. They follow no link, neither to keep nor to delete its target.
"""

import filecmp
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

from lib.config import UserError, configure, dispatch, read_object

DATA, CHECKPOINTS, RESULTS = Path("data/processed"), Path("checkpoints"), Path("evaluation_results")
SESSIONS, BACKUPS = Path("sessions"), Path("backups")


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


def command(*words):
    """Returns a command line to type."""
    return " ".join(["python", *map(str, words)])


def read_values(path):
    """Returns the JSON object in a file, {} where there is none that can be read."""
    with suppress(UserError):
        return read_object(path)
    return {}


def megabytes(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


# ---- status


def datasets():
    """Returns the folders of prepared datasets, the newest first."""
    manifests = DATA.glob("[!.]*/manifest.json")
    return [path.parent for path in sorted(manifests, key=lambda path: -path.stat().st_mtime)]


@dataclass
class Training:
    """A folder of a training, in whatever state it is; each property reads the disk once."""

    folder: Path

    @cached_property
    def problem(self):
        """What is wrong with final/; None if it is a whole model by the hashes of its manifest."""
        from lib.checkpoint import FINAL_FILES, problem_with  # check-env runs without packages

        return problem_with(self.folder / "final", FINAL_FILES)

    @cached_property
    def checkpoint(self):
        """The newest checkpoint from which it can be resumed, or None."""
        from lib.checkpoint import checkpoints, problem_with

        return next((step for step in checkpoints(self.folder) if not problem_with(step)), None)

    @cached_property
    def kind(self):
        """Returns pretrain, sft or dpo, by the keys of a run.json."""
        config = next(filter(None, map(read_values, self.folder.glob("*/run.json"))), {})
        return "dpo" if "beta" in config else "sft" if "dataset_path" in config else "pretrain"

    @cached_property
    def last(self):
        """The newest value of every key in metrics.jsonl."""
        values, path = {}, self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError, TypeError):  # the last line may be half written
                values |= json.loads(line)
        return values

    @cached_property
    def time(self):
        """When it last wrote something."""
        files = [*self.folder.glob("metrics.jsonl"), *self.folder.glob("*/run.json")]
        return max(file.stat().st_mtime for file in files or [self.folder])

    def metrics(self):
        """Returns the newest values that it logged, as text."""
        keys = ("step", "loss", "val_loss", "val_bits_per_byte", "lr", "tokens_per_second")
        values = [f"{k} {self.last[k]:.6g}" for k in keys if self.last.get(k) is not None]
        return ", ".join(values) or "nothing logged"


def trainings():
    """Returns every Training below checkpoints/, the newest first."""
    marks = [p for name in ("metrics.jsonl", "final", "step_*") for p in CHECKPOINTS.rglob(name)]
    folders = {p.parent for p in marks if not any(part.startswith(".") for part in p.parts)}
    return sorted(map(Training, folders), key=lambda training: -training.time)


def describe_dataset(folder):
    """Returns a line on a dataset: its size, or what is wrong with it."""
    from lib.folders import Shards, read_manifest

    try:
        manifest = read_manifest(folder)
        shards = [Shards(folder, split) for split, files in manifest["splits"].items() if files]
    except UserError as error:
        return f"  {folder}: BROKEN: {error}"
    documents, tokens = (sum(getattr(s, name) for s in shards) for name in ("documents", "tokens"))
    vocabulary = manifest["vocab_size"]
    return f"  {folder}: {documents:,} documents, {tokens:,} tokens, vocabulary {vocabulary:,}"


def describe_training(training):
    """Returns a line on a training: state, newest metrics and time."""
    if not training.problem:
        state = "complete"
    elif (training.folder / "final").exists():
        state = f"final/ is BROKEN: {training.problem}"
    else:
        checkpoint = training.checkpoint
        state = f"not complete, {checkpoint.name if checkpoint else 'no whole checkpoint'}"
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(training.time))
    return f"  {training.folder} ({training.kind}): {state} | {training.metrics()} | {day}"


def describe_evaluation(folder):
    """Returns a line on the results of an evaluation."""
    results = read_values(folder / "results.json")
    model, text = (results.get(key) or {} for key in ("model", "perplexity"))
    bits = text.get("bits_per_byte")
    quality = f"{bits:.4f} bits per byte" if isinstance(bits, float) else "perplexity not measured"
    return f"  {folder}: {model.get('path', 'not readable')}, {quality}"


def next_command():
    """Returns (the next command, its reason), by the newest training that is of use."""
    training = next((t for t in trainings() if not t.problem or t.checkpoint), None)
    if training is None and not datasets():
        return command("data.py", "configs/datasets/docstrings.json"), "there is no dataset yet"
    if training is None:
        data = f"--data_path={datasets()[0]}"
        return command("train.py", "configs/demo.json", data), "there is no model yet"
    if training.problem:  # resumed also where its folder was renamed since
        program, preset = (
            training.kind.replace("pretrain", "train"),
            training.checkpoint / "run.json",
        )
        words = ("--resume_from_checkpoint=auto", f"--output_dir={training.folder}")
        return command(f"{program}.py", preset, *words), f"{training.folder} is not complete"
    model = f"--model_path={training.folder}"
    if training.kind == "dpo":
        return command("sample.py", "--chat", model), "every training is done"
    program = "sft" if training.kind == "pretrain" else "dpo"
    rows = Path(f"data/samples/{program}_train.jsonl")
    if not rows.exists():
        return command("data.py", "create_sample_datasets"), f"{program}.py needs rows"
    words = (f"{program}.py", f"configs/{program}.json", model, f"--dataset_path={rows}")
    return command(*words), f"{program} follows {training.kind}"


def status(cfg=None):
    """Datasets, trainings and evaluations as they are on the disk, and the next command."""
    results = [path.parent for path in sorted(RESULTS.rglob("results.json"))]
    for name, lines in {
        "datasets": map(describe_dataset, datasets()),
        "trainings": map(describe_training, trainings()),
        "evaluations": map(describe_evaluation, results),
    }.items():
        print(name, *(list(lines) or ["  none"]), sep="\n")
    todo, reason = next_command()
    print(f"\nnext ({reason}):\n  {todo}")


@dataclass(frozen=True)
class NewestConfig:
    """The kind to look for."""

    # a model of this kind of training, or a dataset
    kind: Literal["any", "pretrain", "sft", "dpo", "data"] = "any"


def newest(kind="any"):
    """Returns the folder of the newest whole model of a kind, or of the newest dataset."""
    if kind == "data":
        folders = iter(datasets())
        remedy = f"no dataset in {DATA}; make one: make prepare"
    else:
        folders = (t.folder for t in trainings() if kind in (t.kind, "any") and not t.problem)
        name = "model" if kind == "any" else f"{kind} model"
        remedy = f"no complete {name} in {CHECKPOINTS}; set MODEL_PATH, or train one: make demo"
    folder = next(folders, None)
    if folder is None:
        raise UserError(remedy)
    return folder


def print_newest(cfg):
    """The folder of the newest whole model, or dataset."""
    folder = newest(cfg.kind)
    print(f"using the newest: {folder}", file=sys.stderr)
    print(folder)


# ---- backup

OPENSSL = "openssl enc -aes-256-cbc -pbkdf2 -iter 600000 -salt -pass env:BACKUP_PASSPHRASE".split()


@dataclass(frozen=True)
class BackupConfig:
    """Where to write. A passphrase comes from the environment: no list of processes shows it."""

    output: str = ""  # the file, .tar.gz or encrypted .tar.gz.enc; empty = backups/ and the time


def paths_to_keep():
    """Yields presets and results; of a training final/, its newest whole step, metrics, curves."""
    yield from (path for path in (Path("configs"), RESULTS) if path.exists())
    for training in trainings():
        if (training.folder / "final").exists():
            yield training.folder / "final"
            if training.problem:
                print(f"warning: {training.folder}/final is BROKEN ({training.problem})")
        yield from filter(None, [training.checkpoint])
        yield from (*training.folder.glob("metrics*"), *training.folder.glob("curves*"))


def without_links(entry):
    """Returns an entry of a backup, None for a link."""
    if entry.issym():
        return print(f"left out: {entry.name}, a link")
    return entry


def run_openssl(*words):
    if code := subprocess.run([*OPENSSL, *map(str, words)]).returncode:
        raise UserError(f"openssl failed with status {code}; nothing was kept")


def write_backup(path, folder, secret):
    """Packs in `folder`, reads it back, encrypts it if `secret`, and moves it to `path`.

    Returns the number of files and folders in it.
    """
    archive = folder / "backup.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for root in paths_to_keep():
            tar.add(root, root.as_posix(), filter=without_links)
        names = tar.getnames()
    with tarfile.open(archive) as tar:  # to its end: gzip checks every byte
        if tar.getnames() != names:
            raise UserError(f"{path}: does not hold what was written; nothing was kept")
    if secret:
        encrypted, decrypted = folder / "encrypted", folder / "decrypted"
        run_openssl("-in", archive, "-out", encrypted)
        run_openssl("-d", "-in", encrypted, "-out", decrypted)
        if not filecmp.cmp(archive, decrypted, shallow=False):
            raise UserError(f"{path}: openssl does not decrypt it; nothing was kept")
        archive = encrypted
    os.replace(archive, path)
    return len(names)


def backup(cfg):
    """Presets, models, newest checkpoints and evaluations in one file, read back afterwards.

    With BACKUP_PASSPHRASE in the environment openssl encrypts it (AES-256, PBKDF2).
    """
    secret = os.environ.get("BACKUP_PASSPHRASE")
    if secret == "":
        raise UserError("BACKUP_PASSPHRASE is empty; set it, or unset it for an open backup")
    name = time.strftime("%Y%m%d_%H%M%S") + ".tar.gz" + (".enc" if secret else "")
    path = Path(cfg.output) if cfg.output else BACKUPS / name
    if path.exists():
        raise UserError(f"{path}: exists; name another --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            count = write_backup(path, Path(folder), secret)
    except OSError as error:  # openssl is missing, too
        remedy = "no backup was kept; name another --output, free space, or install openssl"
        raise UserError(f"{error.filename or path}: {error.strerror}; {remedy}") from None
    print(f"{path}: {count:,} files and folders, {megabytes(path.stat().st_size)}")
    print(f"to unpack: {unpack_command(path, secret)}")


def unpack_command(path, secret):
    path = shlex.quote(str(path))
    return f"{' '.join(OPENSSL)} -d -in {path} | tar -xz" if secret else f"tar -xzf {path}"


# ---- deleting


@dataclass(frozen=True)
class DeleteConfig:
    """Whether to ask."""

    yes: Literal["", "1"] = ""  # 1 = do not ask


def delete(paths, cfg):
    """Lists paths, asks and deletes them; of a link only the link."""
    paths = [path for path in paths if path.exists() or path.is_symlink()]
    if not paths:
        return print("nothing to delete")
    print(*paths, sep="\n", flush=True)
    if not cfg.yes:
        if not sys.stdin.isatty():
            raise UserError("deleting needs a yes, and there is no terminal; set YES=1 (--yes=1)")
        if input("delete these? type yes: ").strip().lower() != "yes":
            return print("nothing was deleted")
    for path in paths:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    print("deleted")


def clean_caches(cfg):
    """Delete caches of Python and of the tools, and the halves of killed backups."""
    caches = [Path(name) for name in ("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis")]
    caches += [*Path(".").glob("[!.]*/__pycache__"), *BACKUPS.glob(".tmp-*")]
    delete(caches, cfg)


def clean_checkpoints(cfg):
    """Delete every training, its models included."""
    from lib.folders import lock_file

    for lock in CHECKPOINTS.rglob("run.lock"):
        with lock.open(encoding="utf-8") as handle:
            if not lock_file(handle):
                raise UserError(f"{lock.parent} is in use by a running training; stop it first")
    delete([CHECKPOINTS], cfg)


def clean_sessions(cfg):
    """Delete the logs of sessions and the toy models of session-debug."""
    delete([SESSIONS], cfg)


# ---- the machine


def version_of(package):
    """Returns the version of an installed package, None if it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe_memory():
    with suppress(OSError):  # only Linux has /proc
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        kilobytes = {name: int(number) for name, number in re.findall(r"(\w+): +(\d+)", text)}
        whole, free = (megabytes(1024 * kilobytes[f"Mem{key}"]) for key in ("Total", "Available"))
        return f"memory {whole}, {free} free"
    return "memory unknown"


def describe_cuda():
    """Returns the names of the cards that torch can use, or the reason why there are none."""
    import torch

    if torch.version.cuda is None:
        return "no: this torch was built without it"
    names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return ", ".join(names) or f"no card found for CUDA {torch.version.cuda}"


def check_env(cfg=None):
    """What this machine has for the programs; exits 1 if something required is missing."""
    text = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8")
    required = {name: version_of(name) for name in re.findall(r"^([\w-]+)[=>]", text, flags=re.M)}
    optional = re.findall(r"^# ([\w-]+): (.*)", text, flags=re.M)
    missing = [package for package, version in required.items() if version is None]
    disk = shutil.disk_usage(".")
    rows = {"python": platform.python_version(), "system": platform.platform()}
    rows |= {package: version or "MISSING" for package, version in required.items()}
    rows |= {"CUDA": describe_cuda()} if required["torch"] else {}
    rows |= {"cores": f"{cores()}, {describe_memory()}"}
    rows |= {"disk here": f"{megabytes(disk.free)} free of {megabytes(disk.total)}"}
    for package, use in optional:
        rows[f"{package} (optional)"] = f"{version_of(package) or 'not installed'}: {use}"
    print("\n".join(f"{name:<24}{value}" for name, value in rows.items()))
    if missing:
        print(f"\nmissing: {', '.join(missing)}; install them: make install")
        raise SystemExit(1)
    print("\nall that is required is there")


def monitor(cfg):
    """Load, memory, GPU and the newest training, once a second until Ctrl-C."""
    while True:
        load = f"load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "load unknown"
        parts = [time.strftime("%H:%M:%S"), f"{load} on {cores()} cores", describe_memory()]
        if shutil.which("nvidia-smi"):
            fields = "--query-gpu=name,utilization.gpu,memory.used,memory.total,temperature.gpu"
            query = ["nvidia-smi", fields, "--format=csv,noheader"]
            parts += subprocess.check_output(query, encoding="utf-8").splitlines()
        parts += [f"{t.folder}: {t.metrics()}" for t in trainings()[:1]]
        print(" | ".join(parts), flush=True)
        time.sleep(1)


@dataclass(frozen=True)
class GpuConfig:
    """Which preset for which card."""

    config: str = "configs/small.json"  # the preset to fit: its batch and accumulation change
    gpu: str | None = None  # a card that is elsewhere, as rtx4090; none = the card in this machine
    output: str = "configs/rtx4090.json"  # the preset to write; it must not exist


def config_gpu(cfg):
    """Write a preset with the largest micro-batch that fits a card, at the same tokens per step."""
    import torch

    from tools.plan import find_card, fitting_rows
    from train import PretrainConfig

    output, preset = Path(cfg.output), configure(PretrainConfig, [cfg.config])
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    if not (cfg.gpu or torch.cuda.is_available()):
        raise UserError("this machine has no CUDA card; name one elsewhere: --gpu=rtx4090")
    here = not cfg.gpu and torch.cuda.get_device_properties(0)
    space = here.total_memory if here else find_card(cfg.gpu, "gpu").memory
    rows = preset.batch_size * preset.gradient_accumulation_steps
    size = max((n for n in fitting_rows(preset, space) if rows % n == 0), default=None)
    if size is None:
        raise UserError(f"{cfg.config}: one row needs more than the card's {megabytes(space)}")
    values = read_object(cfg.config) | {"_why": f"{cfg.config} for {megabytes(space)}"}
    values |= {"batch_size": size, "gradient_accumulation_steps": rows // size}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(values, indent=2), encoding="utf-8")
    print(f"{output}: batch_size {size}, {rows // size} to a step, for {megabytes(space)}")


WORKSPACE_COMMANDS = {
    "status": (status, NoOptions),
    "newest": (print_newest, NewestConfig),
    "backup": (backup, BackupConfig),
    "clean": (clean_caches, DeleteConfig),
    "clean-checkpoints": (clean_checkpoints, DeleteConfig),
    "clean-sessions": (clean_sessions, DeleteConfig),
    "check-env": (check_env, NoOptions),
    "monitor": (monitor, NoOptions),
    "config-gpu": (config_gpu, GpuConfig),
}


if __name__ == "__main__":
    dispatch(WORKSPACE_COMMANDS, sys.argv[1:], __doc__)
