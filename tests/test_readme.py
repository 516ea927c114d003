"""The README's commands, read out of README.md and run in order in an empty directory, shrunk to seconds."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.strip().splitlines()))

# Flags added to, or put in place of, what the README says: the same commands, on toy sizes.
SHAPE = "--n_layer=1 --d_model=32 --n_head=2 --d_ff=64 --sequence_length=64 --batch_size=2 --eval_rows=4"
SHRUNK = {
    "data.py": "--max_docs=60 --min_length=50",
    "train.py": f"{SHAPE} --gradient_accumulation_steps=1 --sample_tokens=4 --warmup_steps=1 --dtype=fp32",
    "sft.py": "--max_steps=2 --warmup_steps=1 --batch_size=2 --sample_tokens=4 --dtype=fp32",
    "dpo.py": "--max_steps=2 --warmup_steps=1 --batch_size=2 --dtype=fp32",
    "sample.py": "--max_new_tokens=4",
    "eval.py": "--max_new_tokens=2 --custom_prompts=prompts.txt",  # ours do not fit 32 positions
    "server.py": "--port=0",
}
NEEDS_NETWORK = ("venv", "data/processed/demo_tiny")


def shrink(command):
    """The words of a command with SHRUNK's flags instead of its own of the same name."""
    words = shlex.split(command)
    script = next((w for w in words if w in SHRUNK), None)
    if script is None or words[2] in ("inspect", "create_sample_datasets", "compare", "assess"):
        return words
    extra = shlex.split(SHRUNK[script])
    if script == "data.py" and "docstrings" in command:
        extra += ["--vocab_size=400"]  # 60 documents support no more
    if script == "train.py" and "--max_steps" not in command:
        extra += ["--max_steps=2", "--max_minutes=none"]
    if script == "train.py":
        extra += ["--vocab_size=400"]
        words = [
            re.sub(r"(max_steps|save_steps)=(100|50)$", lambda m: f"{m[1]}={int(m[2]) // 25}", w)
            for w in words
        ]
        words = [w.replace("step_000050", "step_000002") for w in words]
    names = {flag.split("=")[0] for flag in extra}
    return [w for w in words if w.split("=")[0] not in names] + extra


def run(words, folder):
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    elif words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


def start(words, folder):
    """Starts a server; returns its process, and the address it prints."""
    process = subprocess.Popen([sys.executable, *words[1:]], cwd=folder, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()[0]


def ask(command, url):
    """The answer to the page's curl line, for four tokens."""
    words = shlex.split(command.replace("http://127.0.0.1:8000", url).replace('tokens": 100', 'tokens": 4'))
    return json.loads(subprocess.run(words, capture_output=True, check=True, timeout=60).stdout)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory with the code and nothing else, as after git clone."""
    folder = tmp_path_factory.mktemp("clone")
    kinds = ("*.py", "*.md", "*.txt", "configs", "Makefile")
    for path in (path for kind in kinds for path in ROOT.glob(kind)):
        (folder / path.name).symlink_to(path)
    (folder / "prompts.txt").write_text("a\n")
    return folder


def test_the_commands_run_in_the_order_of_the_page(clone):
    ran, server = [], None
    for command in COMMANDS:
        if command.startswith("make ") or any(word in command for word in NEEDS_NETWORK):
            continue
        if " server.py " in command:
            server, url = start(shrink(command), clone)
        elif command.startswith("curl "):
            if shutil.which("curl"):
                assert ask(command, url).keys() >= {"response", "prompt", "generation_config"}
            server.terminate()
            assert server.wait(60) == 0
        else:
            done = run(shrink(command), clone)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(command)
    scripts = {word for command in ran for word in shlex.split(command) if word.endswith(".py")}
    assert scripts >= {
        "data.py",
        "train.py",
        "sft.py",
        "dpo.py",
        "sample.py",
        "eval.py",
        "server.py",
        "model.py",
    }


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_of_the_page_exist(command, clone):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout


def test_every_flag_on_the_page_is_a_flag_of_its_script(clone):
    helps = {}
    for command in COMMANDS:
        words = shlex.split(command)
        script = next((w for w in words if w.endswith(".py")), None)
        if script:
            help_text = helps.get(script) or run(["python", script, "--help"], clone).stdout
            helps[script] = help_text
            for word in words[words.index(script) :]:
                if word.startswith("--"):
                    assert re.search(rf"^\s*{re.escape(word.split('=')[0])}\b", help_text, flags=re.M), word


def test_the_counts_in_the_table_are_true():
    from configurator import configure
    from model import ModelConfig, count_parameters

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = r"^\| (\w+) \| (\d+) x (\d+) \|.*\| ([\d,]+) \| ([\d,]+) \|$"
    rows = re.findall(pattern, page, flags=re.M)
    assert len(rows) == 5
    for name, layers, width, bare, total in rows:
        cfg = configure(ModelConfig, [str(ROOT / f"configs/{name}.json")], foreign_keys=True)
        counts = count_parameters(cfg)
        assert (cfg.n_layer, cfg.d_model) == (int(layers), int(width))
        assert (counts["non_embedding"], counts["total"]) == (
            int(bare.replace(",", "")),
            int(total.replace(",", "")),
        )
