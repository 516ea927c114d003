"""What is in this folder and on this machine, and what may be kept or deleted.

    python -m tools.workspace status
    python -m tools.workspace newest --kind=sft
    python -m tools.workspace backup --output=backups/monday.tar.gz
    python -m tools.workspace clean | clean-checkpoints | clean-sessions
    python -m tools.workspace check-env | monitor --once
    python -m tools.workspace config-gpu --config=configs/small.json --gpu=rtx4090

The commands look where the programs write, below the current folder: data/processed, checkpoints,
evaluation_results, sessions. They follow no link, neither to keep nor to delete its target.
"""

import contextlib
import filecmp
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from lib.config import UserError, configure, dispatch, read_object

DATA, CHECKPOINTS, RESULTS = Path("data/processed"), Path("checkpoints"), Path("evaluation_results")
SESSIONS, BACKUPS = Path("sessions"), Path("backups")


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


def command(*words):
    """Returns a command line to type, with .venv's Python where that runs this."""
    python = Path(sys.prefix) / ("Scripts" if os.name == "nt" else "bin") / "python"
    here = python.is_relative_to(Path.cwd())
    return " ".join([str(python.relative_to(Path.cwd())) if here else "python", *map(str, words)])


def read_values(path):
    """Returns the JSON object in a file, {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def megabytes(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


# ----------------------------------------------------------------------------------------------
# Status


def by_age(paths):
    return sorted(paths, key=lambda path: -path.stat().st_mtime)


def datasets():
    """Returns the folders of prepared datasets, the newest first."""
    return [path.parent for path in by_age(DATA.glob("[!.]*/manifest.json"))]


def evaluations():
    """Returns the folders that hold results, the newest first."""
    return [path.parent for path in by_age(RESULTS.rglob("results.json"))]


class Training(NamedTuple):
    """One folder of a training and the contents of its files."""

    folder: Path
    kind: str  # pretrain, sft or dpo
    config: dict  # its newest run.json
    last: dict  # the newest value of every key in metrics.jsonl
    time: float  # when it last wrote something

    @property
    def problem(self):
        """What is wrong with final/; None if it is a whole model by the hashes of its manifest."""
        from lib.checkpoint import FINAL_FILES, problem_with  # check-env runs without packages

        return problem_with(self.folder / "final", FINAL_FILES)

    @property
    def steps(self):
        """The checkpoints' folders, the newest first."""
        steps = [p for p in self.folder.glob("step_*") if p.name[5:].isdecimal()]
        return sorted((p for p in steps if not p.is_symlink()), key=lambda p: -int(p.name[5:]))

    @property
    def whole_step(self):
        """The newest checkpoint from which a training can be resumed, or None."""
        from lib.checkpoint import problem_with

        return next((step for step in self.steps if problem_with(step) is None), None)


def read_training(folder):
    """Returns the Training in a folder, whatever state it is in."""
    training, last = Training(folder, "", {}, {}, 0.0), {}
    metrics = folder / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):  # the last line may be half written
            last |= json.loads(line)
    presets = [path / "run.json" for path in (*training.steps[:1], folder / "final")]
    config = next(filter(None, map(read_values, presets)), {})
    kind = "dpo" if "beta" in config else "sft" if "dataset_path" in config else "pretrain"
    times = [path.stat().st_mtime for path in (metrics, *presets) if path.is_file()]
    return Training(folder, kind, config, last, max(times, default=0.0))


def trainings():
    """Returns every training below checkpoints/, the newest first."""
    marks = [p for name in ("metrics.jsonl", "final", "step_*") for p in CHECKPOINTS.rglob(name)]
    folders = {p.parent for p in marks if not any(part.startswith(".") for part in p.parts)}
    return sorted(map(read_training, folders), key=lambda training: -training.time)


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


def preparations():
    """Returns a line on each data preparation that has not ended."""
    for folder in sorted(DATA.glob(".*.partial")):
        name = folder.name.removeprefix(".").removesuffix(".partial")
        count = read_values(folder / "progress.json").get("documents") or 0
        yield f"  {DATA / name}: not complete, {count:,} documents read; the same command goes on"


def describe_training(training, problem):
    """Returns a line on a training: state, time and newest metrics. problem: of its final/."""
    state = "complete"
    if problem and (training.folder / "final").exists():
        state = f"final/ is BROKEN: {problem}"
    elif problem:
        checkpoint = training.whole_step.name if training.whole_step else "no whole checkpoint"
        state = f"not complete, {checkpoint}"
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(training.time)) if training.time else "-"
    return f"  {training.folder} ({training.kind}): {state} | {metrics_of(training)} | {day}"


def metrics_of(training):
    """Returns the newest values that a training logged, as text."""
    keys = ("step", "loss", "val_loss", "val_bits_per_byte", "lr", "tokens_per_second")
    values = [f"{k} {training.last[k]:.6g}" for k in keys if training.last.get(k) is not None]
    return ", ".join(values) or "nothing logged"


def describe_evaluation(folder):
    """Returns a line on the results of an evaluation."""
    results = read_values(folder / "results.json")
    model, text = (results.get(key) or {} for key in ("model", "perplexity"))
    bits = text.get("bits_per_byte")
    quality = f"{bits:.4f} bits per byte" if isinstance(bits, float) else "perplexity not measured"
    return f"  {folder}: {model.get('path', 'not readable')}, {quality}"


def next_command(runs):
    """Returns (the next command, its reason). runs: (Training, its problem), newest first."""
    whole = [training for training, problem in runs if problem is None]
    halves = [training for training, problem in runs if problem and training.whole_step]
    if not datasets() and not runs:
        return command("data.py", "configs/datasets/docstrings.json"), "there is no dataset yet"
    if halves and (not whole or halves[0].time > whole[0].time):
        return resume_command(halves[0]), f"{halves[0].folder} is not complete"
    if not whole:
        data = [f"--data_path={folder}" for folder in datasets()[:1]]
        words = command("train.py", "configs/demo.json", *data) if data else "make prepare"
        return words, "there is no model yet"
    model = f"--model_path={whole[0].folder}"
    program = {"pretrain": "sft", "sft": "dpo"}.get(whole[0].kind)
    if program is None:
        return command("sample.py", "--chat", model), "every training is done"
    rows = Path(f"data/samples/{program}_train.jsonl")
    if not rows.exists():
        return command("data.py", "create_sample_datasets"), f"{program}.py needs rows"
    words = (f"{program}.py", f"configs/{program}.json", model, f"--dataset_path={rows}")
    return command(*words), f"{program} follows {whole[0].kind}"


def resume_command(training):
    """Returns the command that resumes a training, also where its folder was renamed since."""
    program = training.kind.replace("pretrain", "train")
    words = (f"{program}.py", training.whole_step / "run.json", "--resume_from_checkpoint=auto")
    return command(*words, f"--output_dir={training.folder}")


def status(cfg=None):
    """Datasets, trainings and evaluations as they are on the disk, and the next command."""
    runs = [(training, training.problem) for training in trainings()]
    lines = {
        "datasets": [*map(describe_dataset, datasets()), *preparations()],
        "trainings": [describe_training(*run) for run in runs],
        "evaluations": list(map(describe_evaluation, evaluations())),
    }
    for name, section in lines.items():
        print(name, *(section or ["  none"]), sep="\n")
    todo, reason = next_command(runs)
    print(f"\nnext ({reason}):\n  {todo}")


@dataclass(frozen=True)
class NewestConfig:
    """The kind to look for."""

    # a model of this kind of training, or a dataset
    kind: Literal["any", "pretrain", "sft", "dpo", "data"] = "any"


def newest(kind="any"):
    """Returns the folder of the newest whole model of a kind, or of the newest dataset."""
    if kind == "data":
        folders = datasets()
        remedy = f"no dataset in {DATA}; make one: make prepare"
    else:
        folders = (t.folder for t in trainings() if kind in (t.kind, "any") and not t.problem)
        name = "model" if kind == "any" else f"{kind} model"
        remedy = f"no complete {name} in {CHECKPOINTS}; set MODEL_PATH, or train one: make demo"
    folder = next(iter(folders), None)
    if folder is None:
        raise UserError(remedy)
    return folder


def print_newest(cfg):
    """The folder of the newest whole model, or dataset."""
    folder = newest(cfg.kind)
    print(f"using the newest: {folder}", file=sys.stderr)
    print(folder)


# ----------------------------------------------------------------------------------------------
# Backup

OPENSSL = "openssl enc -aes-256-cbc -pbkdf2 -iter 600000 -salt -pass env:BACKUP_PASSPHRASE".split()


@dataclass(frozen=True)
class BackupConfig:
    """Where to write. A passphrase comes from the environment: no list of processes shows it."""

    output: str = ""  # the file, .tar.gz or encrypted .tar.gz.enc; empty = backups/ and the time


def files_to_keep():
    """Returns (files, warnings): presets, results; of a training final/, a step, metrics, curves.

    The step is the newest whole one, else the newest. Links are left out and named in the warnings.
    """
    roots, warnings, files = [Path("configs"), RESULTS], [], set()
    for training in trainings():
        step = training.whole_step or next(iter(training.steps), None)
        roots += [training.folder / "final", *filter(None, [step])]
        roots += [*training.folder.glob("metrics*"), *training.folder.glob("curves*")]
        if (training.folder / "final").exists() and (problem := training.problem):
            warnings.append(f"warning: {training.folder / 'final'} is BROKEN ({problem})")
    for path in (path for root in roots for path in (root, *sorted(root.rglob("*")))):
        if path.is_symlink():
            warnings.append(f"left out: {path}, a link")
        elif path.is_file() and not any(part.startswith(".") for part in path.parts):
            files.add(path)
    return sorted(p for p in files if not any(q.is_symlink() for q in p.parents)), warnings


def run_openssl(*words):
    try:
        code = subprocess.run([*OPENSSL, *map(str, words)]).returncode
    except FileNotFoundError:
        raise UserError("BACKUP_PASSPHRASE needs openssl; install it, or unset that") from None
    if code:
        raise UserError(f"openssl failed with status {code}; nothing was kept")


def write_backup(files, path, folder, secret):
    """Packs files in `folder`, reads them back, encrypts them if `secret`, and moves to `path`."""
    archive = folder / "backup.tar.gz"
    with tarfile.open(archive, "w:gz", dereference=True) as tar:
        for file in files:
            tar.add(file, file.as_posix(), recursive=False)
    with tarfile.open(archive) as tar:  # to its end: gzip checks every byte
        if tar.getnames() != [file.as_posix() for file in files]:
            raise UserError(f"{path}: does not hold what was written; nothing was kept")
    if secret:
        encrypted, decrypted = folder / "encrypted", folder / "decrypted"
        run_openssl("-in", archive, "-out", encrypted)
        run_openssl("-d", "-in", encrypted, "-out", decrypted)
        if not filecmp.cmp(archive, decrypted, shallow=False):
            raise UserError(f"{path}: openssl does not decrypt it; nothing was kept")
        archive = encrypted
    os.replace(archive, path)


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
    files, warnings = files_to_keep()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            write_backup(files, path, Path(folder), secret)
    except (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError) as error:
        remedy = "name another --output, or start again if a training deleted it"
        raise UserError(f"{error.filename or path}: {error.strerror}; {remedy}") from None
    print(*warnings, f"{path}: {len(files):,} files, {megabytes(path.stat().st_size)}", sep="\n")
    print(f"to unpack: {unpack_command(path, secret)}")


def unpack_command(path, secret):
    path = shlex.quote(str(path))
    return f"{' '.join(OPENSSL)} -d -in {path} | tar -xz" if secret else f"tar -xzf {path}"


# ----------------------------------------------------------------------------------------------
# Deleting


@dataclass(frozen=True)
class DeleteConfig:
    """Whether to ask."""

    yes: Literal["", "1"] = ""  # 1 = do not ask


def delete(paths, cfg):
    """Lists paths, asks and deletes them; of a link only the link."""
    paths = [path for path in paths if path.exists() or path.is_symlink()]
    if not paths:
        return print("nothing to delete")
    for path in paths:
        note = "  (a link; what it points to stays)" if path.is_symlink() else ""
        print(f"  {path}{note}", flush=True)
    if not cfg.yes:
        if not sys.stdin.isatty():
            raise UserError("deleting needs a yes, and there is no terminal; set YES=1 (--yes=1)")
        if input("delete these? type yes: ").strip().lower() != "yes":
            return print("nothing was deleted")
    for path in paths:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    print("deleted")


def contents(folder):
    """Returns what is in a folder; of a folder that is a link, the link."""
    return [folder] if folder.is_symlink() else sorted(folder.glob("*"))


def clean_caches(cfg):
    """Delete caches of Python and of the tools, and the halves of killed backups."""
    caches = [Path(name) for name in (".pytest_cache", ".ruff_cache", ".hypothesis")]
    caches += [Path("__pycache__"), *sorted(Path(".").glob("[!.]*/__pycache__"))]
    delete([*caches, *sorted(BACKUPS.glob(".tmp-*"))], cfg)


def clean_checkpoints(cfg):
    """Delete every training, its models included."""
    from lib.folders import lock_file

    for lock in CHECKPOINTS.rglob("run.lock"):
        with lock.open(encoding="utf-8") as handle:
            if not lock_file(handle):
                raise UserError(f"{lock.parent} is in use by a running training; stop it first")
    delete(contents(CHECKPOINTS), cfg)


def clean_sessions(cfg):
    """Delete the logs of sessions and the toy models of session-debug."""
    delete(contents(SESSIONS), cfg)


# ----------------------------------------------------------------------------------------------
# The machine

REQUIRED = "torch numpy sentencepiece datasketch ftfy tqdm safetensors matplotlib".split()
OPTIONAL = {
    "flash-attn": "faster attention on CUDA",
    "datasets": "hf: sources, WikiText-2 and BoolQ for eval.py",
    "pyarrow": ".parquet",
    "zstandard": ".zst",
    "py3langid": "languages other than English",
    "tokenizers": "other models' byte-level tokenizers",
    "gguf": "python -m tools.export --format=gguf",
    "wandb": "--report_to=wandb",
    "tensorboard": "--report_to=tensorboard",
}


def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine_memory():
    """Returns (bytes in all, bytes available), None where there is no /proc."""
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        numbers = dict(line.split(":") for line in text.splitlines())
        return tuple(int(numbers[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    return None


def describe_memory():
    if (numbers := machine_memory()) is None:
        return "not told by this system"
    return f"{megabytes(numbers[0])}, {megabytes(numbers[1])} free"


def describe_cuda():
    """Returns the names of the cards that torch can use, or the reason why there are none."""
    import torch

    if torch.cuda.is_available():
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    version = torch.version.cuda
    return f"no card found for CUDA {version}" if version else "no: this torch was built without it"


def check_env(cfg=None):
    """What this machine has for the programs; exits 1 if something required is missing."""
    versions = {package: version_of(package) for package in REQUIRED}
    missing = [package for package, version in versions.items() if version is None]
    rows = [("python", platform.python_version()), ("system", platform.platform())]
    rows += [(package, version or "MISSING") for package, version in versions.items()]
    rows += [("CUDA", describe_cuda())] if versions["torch"] else []
    disk = shutil.disk_usage(".")
    rows += [("cores", str(cores())), ("memory", describe_memory())]
    rows += [("disk here", f"{megabytes(disk.free)} free of {megabytes(disk.total)}")]
    for package, use in OPTIONAL.items():
        rows.append((f"{package} (optional)", f"{version_of(package) or 'not installed'}: {use}"))
    print("\n".join(f"{name:<24}{value}" for name, value in rows))
    if missing:
        remedy = command("-m", "pip", "install", "-r", "requirements.txt")
        print(f"\nmissing: {', '.join(missing)}; {remedy}")
        raise SystemExit(1)
    print("\nall that is required is there")


@dataclass(frozen=True)
class MonitorConfig:
    """How long."""

    once: bool = False  # one look, for scripts


def describe_cards():
    """Returns a line for each NVIDIA card, or one that says that there is none."""
    if not shutil.which("nvidia-smi"):
        return ["no gpu"]
    fields = "--query-gpu=name,utilization.gpu,memory.used,memory.total,temperature.gpu"
    query = ["nvidia-smi", fields, "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, encoding="utf-8").stdout.splitlines()


def monitor(cfg):
    """Load, memory, GPU and the newest training, once a second until Ctrl-C."""
    while True:
        load = f"load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "load not told"
        parts = [time.strftime("%H:%M:%S"), f"{load} on {cores()} cores"]
        parts += [f"memory {describe_memory()}", *describe_cards()]
        parts += [f"{t.folder}: {metrics_of(t)}" for t in trainings()[:1]] or ["no training"]
        print(" | ".join(parts), flush=True)
        if cfg.once:
            return
        time.sleep(1)


@dataclass(frozen=True)
class GpuConfig:
    """Which preset for which card."""

    config: str = "configs/small.json"  # the preset to fit: its batch and accumulation change
    gpu: str | None = None  # a card that is elsewhere, as rtx4090; none = the card in this machine
    output: str = "configs/rtx4090.json"  # the preset to write; it must not exist


def find_card(gpu):
    """Returns (name, bytes of memory) of a card by its datasheet, or of this machine's card."""
    from lib.runtime import datasheets

    if gpu:
        cards = datasheets()
        if gpu not in cards:
            raise UserError(f"gpu: {gpu!r} is not known; use one of {', '.join(cards)}")
        return gpu, cards[gpu].memory
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"no CUDA card ({describe_cuda()}); name one elsewhere: --gpu=rtx4090")
    card = torch.cuda.get_device_properties(0)
    return card.name, card.total_memory


def config_gpu(cfg):
    """Write a preset with the largest micro-batch that fits a card, at the same tokens per step."""
    output, values = Path(cfg.output), read_object(cfg.config)
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    name, space = find_card(cfg.gpu)
    from tools.plan import RESERVE, memory
    from train import PretrainConfig

    preset = configure(PretrainConfig, [cfg.config])
    rows = preset.batch_size * preset.gradient_accumulation_steps
    for size in sorted((2**k for k in range(rows.bit_length()) if rows % 2**k == 0), reverse=True):
        batch = {"batch_size": size, "gradient_accumulation_steps": rows // size}
        need = memory(replace(preset, **batch))["peak"]
        if need <= space - RESERVE:
            break
    else:
        raise UserError(f"{cfg.config}: one row needs {megabytes(need)}, too much for {name}")
    reason = f"{cfg.config} for {name}: about {megabytes(need)} of {megabytes(space)}"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(values | {"_why": reason} | batch, indent=2), encoding="utf-8")
    print(f"{output}: {reason}; batch_size {size}, {rows // size} to a step")


WORKSPACE_COMMANDS = {
    "status": (status, NoOptions),
    "newest": (print_newest, NewestConfig),
    "backup": (backup, BackupConfig),
    "clean": (clean_caches, DeleteConfig),
    "clean-checkpoints": (clean_checkpoints, DeleteConfig),
    "clean-sessions": (clean_sessions, DeleteConfig),
    "check-env": (check_env, NoOptions),
    "monitor": (monitor, MonitorConfig),
    "config-gpu": (config_gpu, GpuConfig),
}


if __name__ == "__main__":
    dispatch(WORKSPACE_COMMANDS, sys.argv[1:], __doc__)
