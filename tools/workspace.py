"""What is in this folder and on this machine, and what may be kept or deleted.

    python -m tools.workspace status
    python -m tools.workspace backup --output=backups/monday.tar.gz

The commands look below the current folder where the programs write: data/processed, checkpoints,
evaluation_results, sessions. They follow no link, neither to keep nor to delete its target.
"""

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
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

from lib.config import UserError, configure, dispatch, read_object, refusing, save_config

# lib.checkpoint and lib.folders need packages; check-env runs without, so they are imported below

DATA, CHECKPOINTS, RESULTS = Path("data/processed"), Path("checkpoints"), Path("evaluation_results")
SESSIONS = Path("sessions")


@dataclass(frozen=True)
class WorkspaceConfig:
    """The options of all commands; status, check-env and monitor use none."""

    kind: Literal["any", "pretrain", "sft", "dpo", "grpo", "data"] = "any"  # newest: of which kind
    # backup: a .tar.gz, or encrypted a .tar.gz.enc, by default in backups/;
    # config-gpu: the preset, by default configs/rtx4090.json; it must not exist
    output: str = ""
    yes: Literal["", "1"] = ""  # clean...: 1 = do not ask
    config: str = "configs/small.json"  # config-gpu: the preset to fit
    gpu: str = ""  # config-gpu: a card elsewhere, as rtx4090; empty = the card in this machine


def read_values(path):
    """Returns the JSON object in a file, {} where there is none that can be read."""
    with suppress(UserError):
        return read_object(path)
    return {}


def megabytes(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


# ---- status


def newest_first(paths):
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def datasets():
    """Returns the folders of prepared datasets, the newest first."""
    return [path.parent for path in newest_first(DATA.glob("[!.]*/manifest.json"))]


@dataclass
class Training:
    """A folder of a training, in whatever state it is; each property reads the disk once."""

    folder: Path

    @cached_property
    def problem(self):
        """What is wrong with final/; None if it is a whole model by the hashes of its manifest."""
        from lib.checkpoint import FINAL_FILES, problem_with

        return problem_with(self.folder / "final", FINAL_FILES)

    @cached_property
    def checkpoint(self):
        """The newest checkpoint from which it can be resumed, or None."""
        from lib.checkpoint import checkpoints, problem_with

        return next((step for step in checkpoints(self.folder) if not problem_with(step)), None)

    @cached_property
    def kind(self):
        """Returns pretrain, sft, dpo or grpo, by the keys of a run.json."""
        config = next(filter(None, map(read_values, self.folder.glob("*/run.json"))), {})
        marks = {"num_generations": "grpo", "beta": "dpo", "dataset_path": "sft"}
        return next((kind for key, kind in marks.items() if key in config), "pretrain")

    @cached_property
    def newest(self):
        """The newest value of each column of metrics.jsonl; {} before its first step."""
        from lib.curves import read_run

        with suppress(UserError):
            return {name: y[-1] for name, (_, y) in read_run(self.folder, "steps").items()}
        return {}

    def progress(self):
        """Returns the newest values that it logged, as text."""
        keys = ("step", "loss", "val_loss", "val_bits_per_byte", "tokens_per_second")
        shown = [f"{key} {self.newest[key]:.6g}" for key in keys if key in self.newest]
        return ", ".join(shown) or "nothing logged"

    def state(self):
        """Returns whether it is complete, broken or to be resumed, as text."""
        if self.problem and (self.folder / "final").exists():
            return f"final/ is BROKEN: {self.problem}"
        step = self.checkpoint.name if self.checkpoint else "no whole checkpoint"
        return f"not complete, {step}" if self.problem else "complete"


def trainings():
    """Returns every Training below checkpoints/, the newest first."""
    marks = (CHECKPOINTS.rglob(name) for name in ("metrics.jsonl", "final", "step_*"))
    return [Training(folder) for folder in newest_first({p.parent for ps in marks for p in ps})]


def dataset_state(folder):
    from lib.folders import Shards, read_manifest

    try:
        manifest = read_manifest(folder)
        shards = [Shards(folder, split) for split, files in manifest["splits"].items() if files]
    except UserError as error:
        return f"BROKEN: {error}"
    documents, tokens = (sum(getattr(s, name) for s in shards) for name in ("documents", "tokens"))
    return f"{documents:,} documents, {tokens:,} tokens, vocabulary {manifest['vocab_size']:,}"


def next_command():
    """Returns the next command, by the newest training that is of use."""
    training = next((t for t in trainings() if not t.problem or t.checkpoint), None)
    if training is None:
        text = f"train.py configs/demo.json --data_path={datasets()[0]}" if datasets() else ""
        return f"python {text or 'data.py configs/datasets/docstrings.json'}"
    if training.problem:  # resumed also where its folder was renamed since
        program = training.kind.replace("pretrain", "train")
        flags = f"--resume_from_checkpoint=auto --output_dir={training.folder}"
        return f"python {program}.py {training.checkpoint / 'run.json'} {flags}"
    following = {"pretrain": "sft", "sft": "dpo"}.get(training.kind)
    if following and not Path("data/samples").exists():
        return "python data.py create_sample_datasets"
    rows = f"configs/{following}.json --dataset_path=data/samples/{following}_train.jsonl"
    words = f"{following}.py {rows}" if following else "sample.py --chat"
    return f"python {words} --model_path={training.folder}"


def status(cfg=None):
    """Datasets, trainings and evaluations as they are on the disk, and the next command."""
    print("datasets")
    for folder in datasets():
        print(f"  {folder}: {dataset_state(folder)}")
    print("trainings")
    for training in trainings():
        state = f"{training.state()} | {training.progress()}"
        print(f"  {training.folder} ({training.kind}): {state}")
    print("evaluations")
    for path in newest_first(RESULTS.rglob("results.json")):
        text = read_values(path).get("perplexity") or {}
        print(f"  {path.parent}: bits per byte {text.get('bits_per_byte', 'not measured')}")
    print(f"\nnext:\n  {next_command()}")


def newest_folder(kind="any"):
    """Returns the folder of the newest whole model of a kind, or of the newest dataset."""
    models = (t.folder for t in trainings() if kind in (t.kind, "any") and not t.problem)
    folder = next(iter(datasets()) if kind == "data" else models, None)
    if folder is None:
        name = {"data": "dataset", "any": "model"}.get(kind, f"{kind} model")
        raise UserError(f"no complete {name} here; set MODEL_PATH or DATA_PATH, or run make demo")
    return folder


def newest(cfg):
    """The folder of the newest whole model, or dataset."""
    print(newest_folder(cfg.kind))


# ---- backup

OPENSSL = "openssl enc -aes-256-cbc -pbkdf2 -iter 600000 -salt -pass env:BACKUP_PASSPHRASE".split()


def paths_to_keep():
    """Returns presets and results; of a training final/, its newest whole step, metrics, curves."""
    paths = [Path("configs"), RESULTS]
    for training in trainings():
        paths += [training.folder / "final", *filter(None, [training.checkpoint])]
        paths += [*training.folder.glob("metrics*"), *training.folder.glob("curves*")]
    return [path for path in paths if path.exists()]


def backup(cfg):
    """Presets, models, newest checkpoints and evaluations in one file, read back afterwards.

    With BACKUP_PASSPHRASE in the environment openssl encrypts it (AES-256, PBKDF2). A link is
    packed as a link.
    """
    secret = os.environ.get("BACKUP_PASSPHRASE")  # not an option: all see a process's words
    if secret == "":
        raise UserError("BACKUP_PASSPHRASE is empty; set it, or unset it for an open backup")
    name = time.strftime("%Y%m%d_%H%M%S") + (".tar.gz.enc" if secret else ".tar.gz")
    path = Path(cfg.output or f"backups/{name}")
    if path.exists():
        raise UserError(f"{path}: exists; name another --output")
    errors = OSError, EOFError, tarfile.TarError, subprocess.SubprocessError
    remedy = "name another --output, free space, or see to openssl"
    with refusing(errors, f"{path}: no backup was kept", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            archive, encrypted = Path(folder, "backup.tar.gz"), Path(folder, "encrypted")
            with tarfile.open(archive, "w:gz") as tar:
                for root in paths_to_keep():
                    tar.add(root, root.as_posix())
                names = tar.getnames()
            if secret:
                subprocess.run([*OPENSSL, "-in", archive, "-out", encrypted], check=True)
                subprocess.run([*OPENSSL, "-d", "-in", encrypted, "-out", archive], check=True)
            with tarfile.open(archive) as tar:  # to its end: gzip checks every byte
                if tar.getnames() != names:
                    raise tarfile.TarError("it does not hold what was written")
            os.replace(encrypted if secret else archive, path)
    print(f"{path}: {len(names):,} files and folders, {megabytes(path.stat().st_size)}")
    words = f"{' '.join(OPENSSL)} -d -in {{}} | tar -xz" if secret else "tar -xzf {}"
    print("to unpack:", words.format(shlex.quote(str(path))))


# ---- deleting


def delete(cfg, *patterns):
    """Lists what there is, asks and deletes it; of a link only the link."""
    paths = [path for pattern in patterns for path in Path().glob(pattern)]
    if not paths:
        return print("nothing to delete")
    print(*paths, sep="\n", flush=True)
    if not (cfg.yes or (sys.stdin.isatty() and input("delete these? type yes: ") == "yes")):
        raise UserError("nothing was deleted: that needs a yes; in a script set YES=1 (--yes=1)")
    for path in paths:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    print("deleted")


def clean_caches(cfg):
    """Delete caches of Python and of the tools, and the halves of killed backups and exports."""
    caches = ("__pycache__", "[!.]*/__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis")
    delete(cfg, *caches, "backups/.tmp-*", "exported/.tmp-*")


def clean_checkpoints(cfg):
    """Delete every training, its models included."""
    from lib.folders import lock_file

    for lock in CHECKPOINTS.rglob("run.lock"):
        with lock.open(encoding="utf-8") as handle:
            if not lock_file(handle):
                raise UserError(f"{lock.parent} is in use by a running training; stop it first")
    delete(cfg, "checkpoints")


def clean_sessions(cfg):
    """Delete the logs of sessions and the toy models of session-debug."""
    delete(cfg, "sessions")


# ---- the machine


def describe_machine():
    """Returns cores, load and memory, as far as the system tells: all of it on Linux."""
    text = f"{os.cpu_count()} cores"
    with suppress(AttributeError, OSError):
        text += f", load {os.getloadavg()[0]:.2f}"
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()  # in units of KiB
        sizes = {line.split()[0]: megabytes(1024 * int(line.split()[1])) for line in lines}
        text += f", memory {sizes['MemTotal:']}, free {sizes['MemAvailable:']}"
    return text


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
    required = re.findall(r"^([\w-]+)[=>]", text, flags=re.M)
    versions = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    missing = [package for package in required if package not in versions]
    disk = shutil.disk_usage(".")
    rows = {"python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {package: versions.get(package, "MISSING") for package in required}
    rows |= {"CUDA": describe_cuda()} if "torch" in versions else {}
    rows |= {"machine": describe_machine()}
    rows |= {"disk here": f"{megabytes(disk.free)} free of {megabytes(disk.total)}"}
    for package, use in re.findall(r"^# ([\w-]+): (.*)", text, flags=re.M):
        rows[f"{package} (optional)"] = f"{versions.get(package, 'not installed')}: {use}"
    print("\n".join(f"{name:<24}{value}" for name, value in rows.items()))
    if missing:
        print(f"\nmissing: {', '.join(missing)}; install them: make install")
        raise SystemExit(1)
    print("\nall that is required is there")


def monitor(cfg):
    """Load, memory, GPU and the newest training, once a second until Ctrl-C."""
    query = "nvidia-smi --format=csv,noheader --query-gpu=name,utilization.gpu,memory.used"
    while True:
        parts = [time.strftime("%H:%M:%S"), describe_machine()]
        if shutil.which("nvidia-smi"):
            parts += subprocess.check_output(query.split(), encoding="utf-8").splitlines()
        parts += [f"{t.folder}: {t.progress()}" for t in trainings()[:1]]
        print(" | ".join(parts), flush=True)
        time.sleep(1)


def config_gpu(cfg):
    """Write a preset with the largest micro-batch that fits a card, at the same tokens per step."""
    import torch

    from tools.plan import find_card, fitting_rows
    from train import PretrainConfig

    output = Path(cfg.output or "configs/rtx4090.json")
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    if not (cfg.gpu or torch.cuda.is_available()):
        raise UserError("this machine has no CUDA card; name one elsewhere: --gpu=rtx4090")
    card = find_card(cfg.gpu, "gpu").memory if cfg.gpu else torch.cuda.mem_get_info()[1]
    preset = configure(PretrainConfig, [cfg.config])
    rows = preset.batch_size * preset.gradient_accumulation_steps
    size = max((n for n in fitting_rows(preset, card) if rows % n == 0), default=None)
    if size is None:
        raise UserError(f"{cfg.config}: one row needs more than the card's {megabytes(card)}")
    fitted = replace(preset, batch_size=size, gradient_accumulation_steps=rows // size)
    save_config(fitted, output, _why=f"{cfg.config} for {megabytes(card)}")
    print(f"{output}: batch_size {size}, {rows // size} to a step, for {megabytes(card)}")


if __name__ == "__main__":
    functions = {"status": status, "newest": newest, "backup": backup}
    functions |= {"clean": clean_caches, "clean-checkpoints": clean_checkpoints}
    functions |= {"clean-sessions": clean_sessions, "check-env": check_env}
    functions |= {"monitor": monitor, "config-gpu": config_gpu}
    commands = {name: (function, WorkspaceConfig) for name, function in functions.items()}
    dispatch(commands, sys.argv[1:], __doc__)
