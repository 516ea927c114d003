"""What is learned in a fixed time: train.py against transformers' Trainer, and the recipe's own
choices.

    python benchmarks/learn.py   ours and transformers, 30 minutes each
    python benchmarks/learn.py --runs=adamw,muon,adamw+lr_6e-3   by name; + joins choices
    python benchmarks/learn.py --runs=recipes --minutes=10       every choice of RECIPES by itself
    # as many steps each
    python benchmarks/learn.py --runs=recipes --steps=2400 --jobs=12 --device=cuda
    python benchmarks/learn.py --runs=ours,adamw_lr_1e-2 --steps=600 --seeds=1,2,3
    python benchmarks/learn.py --runs=none                       the table of what has been measured

Same model shape, tokenizer, data, batch tokens, minutes, threads. `ours` is `python train.py RECIPE
--max_minutes`, another name is that with what RECIPES says. `transformers` is its model of the same
shape under Trainer with its defaults (AdamW, learning rate 5e-5, falling linearly, no warmup),
`transformers_fair` has our learning rate, schedule, betas and decay, and bf16 or
torch.compile where ours has them. Its schedules follow the clock, as ours does: no guess of how
many steps there will be. Clocks run while training, validations included, not while programs start.

Afterwards each model folder is measured in the same way: `wikitext2`, bits per byte of eval.py on
WikiText-2's validation text, stride half a context; `held_out`, those of the prepared dataset's
validation documents. One JSON line a run is appended to OUTPUT_DIR/results.jsonl; what is in there
is not run again, and an interrupted run of ours goes on where it was. With --steps (of the recipe's
batch) only ours can run, in float32, and `held_out` is its last validation: a machine may then run
several at once. The data is prepared once, into --data, from Gutenberg's books and documentation in
--corpora. "steps / adamw" is how many steps `adamw` took to its last validation loss over those
that a run took to come below it, a line drawn between its validations.

A row of the table is the mean over --seeds. It is compared with `ours`, or else with the first of
--runs, seed by seed, because a seed is an order of the data, which matters more than many a choice.
From two common seeds on the table has the mean difference on held-out text with the 95% interval of
a paired t-test; it "differs" if the interval does not hold 0.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from scipy import stats

from data import TokenStream
from lib.config import configure, narrow
from lib.runtime import choose_dtype, to_device
from lib.tokenizer import Tokenizer
from model import ModelConfig, next_token_loss, to_hf
from train import PretrainConfig, lr_at

SHARED = ROOT.parent / "shared/data"
DOCS = [
    "debian_handbook",
    "debian_manuals",
    "git_doc",
    "peps",
    "postgresql_docs",
    "python_docs",
    "rust_rfcs",
]
TEXTS = {"gutenberg_books": 2.0} | dict.fromkeys(DOCS, 0.3)
PROOF = ["ours", "transformers", "transformers_fair"]
RECIPES = {
    "adamw": ["--optimizer=adamw", "--adamw_learning_rate=none"],
    "adamw_lr_1e-2": ["--adamw_learning_rate=1e-2"],
    "adamw_lr_3e-2": ["--adamw_learning_rate=3e-2"],
    "muon": ["--optimizer=muon"],
    "lr_1e-3": ["--learning_rate=1e-3"],
    "lr_2e-3": ["--learning_rate=2e-3"],
    "lr_6e-3": ["--learning_rate=6e-3"],
    "lr_1e-2": ["--learning_rate=1e-2"],
    "lr_2e-2": ["--learning_rate=2e-2"],
    "warmup_0": ["--warmup_steps=0"],
    "warmup_200": ["--warmup_steps=200"],
    "cosine": ["--wsd_decay=none"],
    "no_qk_norm": ["--qk_norm=false"],
    "min_lr_tenth": ["--min_lr=none"],
    "min_lr_third": ["--min_lr=1e-3"],
    "batch_4": ["--batch_size=4"],
    "batch_16": ["--batch_size=16"],
    "init_0.01": ["--initializer_range=0.01"],
    "init_0.04": ["--initializer_range=0.04"],
    "untied": ["--no_tie_word_embeddings"],
    "document_mask": ["--document_mask"],
    "decay_0": ["--weight_decay=0"],
    "decay_0.3": ["--weight_decay=0.3"],
    "beta2_0.99": ["--beta2=0.99"],
    "compile": ["--compile"],
}


def prepare(args):
    """Prepares the dataset of --data, if it is not there."""
    data = Path(args.data)
    if (data / "manifest.json").is_file():
        return
    entries = [
        {"name": name, "input_path": f"{args.corpora}/{name}.jsonl.gz", "weight": weight}
        for name, weight in TEXTS.items()
    ]
    preset = {
        "mixture": entries,
        "output_dir": str(data),
        "vocab_size": 4096,
        "sequence_length": 256,
    }
    data.parent.mkdir(parents=True, exist_ok=True)
    path = data.with_name(f"{data.name}.json")
    path.write_text(
        json.dumps(preset | {"code": "keep", "min_length": 200, "max_length": 200_000}, indent=2)
        + "\n"
    )
    subprocess.run([sys.executable, ROOT / "data.py", path], check=True, stdout=sys.stderr)


# ---- a training each


def flags_of(name):
    """Returns the flags of `ours` or of choices joined by +; SystemExit for what is neither."""
    parts = [part for part in name.split("+") if part != "ours"]
    if unknown := [part for part in parts if part not in RECIPES]:
        raise SystemExit(
            f"error: --runs: {unknown[0]!r} is none of {', '.join([*PROOF, *RECIPES])}"
        )
    return [flag for part in parts for flag in RECIPES[part]]


def our_command(name, seed, folder, args):
    own = {
        "data_path": args.data,
        "seed": seed,
        "output_dir": folder,
        "max_minutes": args.minutes,
        "save_steps": 1000,
    }
    own |= {
        "keep_last": 1,
        "sample_tokens": 0,
        "resume_from_checkpoint": "auto",
        "device": args.device,
    }
    if args.steps:  # as many tokens, whatever the batch
        rows = [
            configure(PretrainConfig, [args.recipe, *flags]).batch_size
            for flags in ([], flags_of(name))
        ]
        steps = args.steps * rows[0] // rows[1]
        own |= {"max_minutes": "none", "max_steps": steps, "eval_rows": 512, "dtype": "fp32"}
        own |= {"compile": "false"}
    return [
        str(ROOT / "train.py"),
        args.recipe,
        *(f"--{k}={v}" for k, v in own.items()),
        *flags_of(name),
    ]


class Blocks(torch.utils.data.Dataset):
    """Rows of T tokens from the shards as they lie there: transformers shifts the labels itself."""

    def __init__(self, folder, length):
        shards = [
            np.memmap(path, np.uint16, mode="r")
            for path in sorted(Path(folder).glob("train_*.bin"))
        ]
        self.tokens, self.length = np.concatenate(shards), length

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, number):
        row = self.tokens[number * self.length : (number + 1) * self.length].astype(np.int64)
        return {"input_ids": row, "labels": row}


def train_transformers(fair, folder, args):
    """Trains a model of transformers, of our shape, for --minutes; leaves folder/final/."""
    import transformers

    cfg = configure(PretrainConfig, [args.recipe, f"--seed={args.seeds}"])
    cfg = replace(cfg, max_minutes=args.minutes)
    began = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            began.append(time.monotonic())

        def on_step_end(self, arguments, state, control, **_):
            control.should_training_stop = progress() >= 1

    def progress():
        return (time.monotonic() - began[0]) / (60 * args.minutes) if began else 0.0

    def share(step):
        return (
            lr_at(cfg, step, progress(), None) / cfg.learning_rate
            if fair
            else max(0.0, 1 - progress())
        )

    class OnTheClock(transformers.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, share
            )
            return self.lr_scheduler

    ours = {
        "learning_rate": cfg.learning_rate, "weight_decay": cfg.weight_decay,
        "adam_beta1": cfg.beta1,
        "adam_beta2": cfg.beta2, "torch_compile": bool(cfg.compile),
        "bf16": choose_dtype(cfg.dtype, torch.device("cpu"))[0] == torch.bfloat16,
    }  # fmt: skip
    settings = transformers.TrainingArguments(
        str(folder), max_steps=10**9, per_device_train_batch_size=cfg.batch_size,
        save_strategy="no",
        gradient_accumulation_steps=cfg.gradient_accumulation_steps, logging_steps=50,
        report_to="none",
        disable_tqdm=True, use_cpu=True, seed=cfg.seed, **(ours if fair else {}),
    )  # fmt: skip
    torch.manual_seed(cfg.seed)
    shape = transformers.AutoConfig.for_model(**to_hf(narrow(cfg, ModelConfig)))
    model = transformers.AutoModelForCausalLM.from_config(shape)
    trainer = OnTheClock(
        model, settings, train_dataset=Blocks(args.data, cfg.sequence_length), callbacks=[Clock()]
    )
    trainer.train()
    model.save_pretrained(folder / "final")
    Tokenizer.load(Path(args.data) / "tokenizer.model").save(folder / "final", cfg.sequence_length)
    (folder / "steps.json").write_text(json.dumps({"step": trainer.state.global_step}) + "\n")


# ---- what came of it


def measure(folder, args):
    """Prints {"wikitext2", "held_out"} of a model folder, bits per byte, as one line; the child's
    side.
    """
    from eval import EvalConfig, prepare_text
    from sample import open_model  # tells OpenMP how to wait: not to be inherited by what trains

    model, tokenizer = open_model(folder, "cpu", "fp32")
    cfg = EvalConfig(model_path=str(folder))
    text = prepare_text(cfg, model, tokenizer, args.text)()
    stream = TokenStream((args.data,), "val", model.cfg.sequence_length, 8)
    sizes, nats, size = tokenizer.token_bytes(), 0.0, 0
    for at in range(0, stream.blocks, 8):
        batch = stream.rows(at, at + 8)
        with torch.no_grad():
            nats += next_token_loss(model, to_device(batch, torch.device("cpu")))[0].item()
        size += int(sizes[batch["labels"][batch["labels"] >= 0]].sum())
    print(json.dumps({"wikitext2": text["bits_per_byte"], "held_out": nats / math.log(2) / size}))


def history(folder):
    """Returns (steps taken, [[step, validation loss, bits per byte], ...]) of a run's folder."""
    if (folder / "steps.json").is_file():
        return json.loads((folder / "steps.json").read_text())["step"], []
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
        [record["step"], round(record["val_loss"], 5), round(record["val_bits_per_byte"], 5)]
        for record in records
        if "val_loss" in record
    ]
    return records[-1]["step"], curve


def length_of(args):
    return f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"


def one_run(name, seed, args):
    """Trains and measures `name`; returns its line for results.jsonl."""
    folder = Path(args.output_dir) / f"{name}-{length_of(args).replace(' ', '-')}-{seed}"
    own = {"minutes": args.minutes, "data": args.data, "recipe": args.recipe, "text": args.text}
    own |= {"seeds": seed}
    child = [__file__, *(f"--{k}={v}" for k, v in own.items()), f"--output_dir={folder}"]
    theirs = name.startswith("transformers")
    words = [*child, f"--child={name}"] if theirs else our_command(name, seed, folder, args)
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
    steps, curve = history(folder)
    if args.steps:
        figures = {"held_out": curve[-1][2]}
    else:
        words = [sys.executable, *child, "--child=measure"]
        figures = json.loads(
            subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    cfg = configure(PretrainConfig, [args.recipe, *([] if theirs else flags_of(name))])
    tokens = steps * cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length
    return {
        "name": name, "seed": seed, "length": length_of(args), "steps": steps, "tokens": tokens,
        **{key: round(value, 4) for key, value in figures.items()},
        "recipe": Path(args.recipe).name, "dataset": dataset(args), "validations": curve,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def dataset(args):
    """Returns what tells one prepared dataset from another, as 12 digits."""
    return hashlib.sha256((Path(args.data) / "manifest.json").read_bytes()).hexdigest()[:12]


def measured(args):
    """Returns {name: {seed: line}} of results.jsonl, of this length, this recipe, this dataset."""
    path, runs = Path(args.output_dir) / "results.jsonl", {}
    same = {"length": length_of(args), "recipe": Path(args.recipe).name, "dataset": dataset(args)}
    for text in path.read_text().splitlines() if path.is_file() else []:
        line = json.loads(text)
        if same.items() <= line.items():
            runs.setdefault(line["name"], {})[line.get("seed", 42)] = line
    return runs


def steps_to(curve, loss):
    """Returns the step at which a run's validation loss comes down to `loss`, None if it never
    does.
    """
    for (before, high, _), (step, low, _) in zip([curve[0], *curve], curve):
        if low <= loss:
            return step - (step - before) * (loss - low) / (high - low) if high > low else step
    return None


def table(runs, base):
    """Returns the measured runs as a table, best on held-out text first; `base`: a name."""
    texts = lambda name, seeds: [runs[name][seed]["held_out"] for seed in seeds]
    means = {name: statistics.mean(texts(name, runs[name])) for name in runs}
    head = ["run", "seeds", "steps", "tokens", "wikitext2", "held out"]
    head += [f"minus {base}", "", "steps / adamw"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in sorted(runs, key=means.get):
        lines, difference = [*runs[name].values()], ["", ""]
        wikitext2 = [line["wikitext2"] for line in lines if "wikitext2" in line]
        both = sorted(runs[name].keys() & runs.get(base, {}).keys())
        if name != base and len(both) > 1:
            ours, theirs = texts(name, both), texts(base, both)
            low, high = stats.ttest_rel(ours, theirs).confidence_interval()
            away = statistics.mean(ours) - statistics.mean(theirs)
            difference = [f"{away:+.4f} [{low:+.4f}..{high:+.4f}]"]
            difference.append("differs" if low > 0 or high < 0 else "does not differ")
        cells = [name, len(lines)]
        cells += [
            f"{statistics.mean(line[key] for line in lines):,.0f}" for key in ("steps", "tokens")
        ]
        cells += [f"{statistics.mean(wikitext2):.4f}" if wikitext2 else "", f"{means[name]:.4f}"]
        rows.append(f"| {' | '.join(map(str, [*cells, *difference, faster(runs, name)]))} |")
    return "\n".join(rows)


def faster(runs, name):
    """Returns "steps / adamw", of the seed that is first."""
    base, line = (next(iter(runs.get(n, {}).values()), {}) for n in ("adamw", name))
    if not (base.get("validations") and line["validations"]):
        return ""
    needed = steps_to(line["validations"], base["validations"][-1][1])
    return f"{base['validations'][-1][0] / needed:.2f}" if needed else ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default=",".join(PROOF))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="instead of minutes, of ours alone")
    parser.add_argument("--seeds", default="42", help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cpu", help="of ours")
    parser.add_argument("--recipe", default=str(ROOT / "configs/demo.json"))
    parser.add_argument("--data", default="data/processed/learn")
    parser.add_argument("--corpora", default=str(SHARED / "corpora"))
    parser.add_argument("--text", default=str(SHARED / "wikitext2/wiki.valid.raw"))
    parser.add_argument("--output_dir", default="checkpoints/learn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "measure":
        return measure(Path(args.output_dir) / "final", args)
    if args.child:
        return train_transformers(args.child == "transformers_fair", Path(args.output_dir), args)
    names = {"recipes": ["ours", *RECIPES], "none": []}.get(args.runs, args.runs.split(","))
    for name in names:
        name in PROOF or flags_of(name)  # a wrong one is told before anything runs
    prepare(args)
    os.makedirs(args.output_dir, exist_ok=True)

    def run(name, seed):
        line = json.dumps(one_run(name, seed, args))
        with open(Path(args.output_dir) / "results.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    done = measured(args)
    wanted = [(n, int(s)) for s in args.seeds.split(",") for n in dict.fromkeys(names)]
    wanted = [(name, seed) for name, seed in wanted if seed not in done.get(name, {})]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda pair: run(*pair), wanted))
    print(table(measured(args), "ours" if "ours" in names or not names else names[0]))


if __name__ == "__main__":
    main()
