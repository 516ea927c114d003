"""Reinforcement learning on a laptop: what grpo.py gains and forgets, and its speed beside trl.

    python benchmarks/grpo.py checkpoints/sft/demo                       all parts
    python benchmarks/grpo.py checkpoints/sft/demo --parts=learn --minutes=5 --seeds=1,2,3
    python benchmarks/grpo.py checkpoints/sft/demo --parts=speed --steps=20

learn       grpo.py with configs/grpo.json on the sums, differences and products of data/samples,
            for --minutes, each seed; then with coin flips as rewards (control). Before and after:
            those in no file to train on, the held-out tasks of all kinds alone, in mid-conversation
            and under a system message (benchmarks/conversations.py), and bits per byte of --text.
            Shares are means over the seeds, with 95% Wilson intervals for as many answers as there
            are tasks
choices     the same with the first seed for each of CHOICES
arithmetic  sums of numbers below 20, 100 and 1,000: SFT on some, of 25, 50, 100 ... steps until a
            share --low of the held-out ones is right, then grpo.py on others
speed       prompt and answer tokens per second of the whole loop: ours, and trl's GRPOTrainer on
            the same model, questions, sizes and threads; processes of their own, medians of rounds

One JSON line is appended to OUTPUT_DIR/results.jsonl for each run; what is there is not run again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.conversations import answers, contexts, user
from corpus.samples import TABLES, TASKS, passes
from eval import wilson
from sample import open_model

COINS = """import random
chance = random.Random(0)
score = lambda *_: float(chance.random() < 0.5)
"""
DR_GRPO = {"loss": "dr_grpo", "scale_rewards": False, "redraws": 0}
GRPO = {"loss": "grpo", "redraws": 0, "epsilon_high": 0.2}
CHOICES = {
    "dapo": {},
    "dr_grpo": DR_GRPO,
    "dr_grpo, redraws": DR_GRPO | {"redraws": 2},
    "grpo": GRPO,
    "grpo, KL": GRPO | {"beta": 0.04},
    "two updates": DR_GRPO | {"num_iterations": 2},
    "learning rate / 2": DR_GRPO | {"learning_rate": 5e-5},
    "learning rate x 2": DR_GRPO | {"learning_rate": 2e-4},
}
CALCULATIONS = "addition", "subtraction", "multiplication"
LEVELS = {20: 150, 100: 2000, 1000: 8000}  # summands below this: how many sums SFT learns from


def program(name, *words, **flags):
    """Runs one of our programs; returns the seconds it took. Fails as it fails."""
    words = [sys.executable, f"{name}.py", *words, *(f"--{k}={v}" for k, v in flags.items())]
    start = time.perf_counter()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def share(right, count):
    low, high = wilson(right, count)
    return {"share": round(right / count, 4), "low": round(low, 4), "high": round(high, 4)}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def single_rows(name):
    return [row for row in rows_of(ROOT / "data/samples" / name) if type(row.get("prompt")) is str]


def calculations(folder):
    """Writes questions to train on, those of the sample files, and all others of their kinds.

    Returns both paths. The others stand in no file that SFT or DPO trains on.
    """
    rows = [row for name in ("sft_train.jsonl", "dpo_train.jsonl") for row in single_rows(name)]
    rows, others = [row for row in rows if row["kind"] in CALCULATIONS], []
    used = {row["prompt"] for row in rows}
    for kind in CALCULATIONS:
        for values, (_, check, _) in TASKS[kind](random.Random(0)):
            prompts = {form.format(*values) for form in TABLES["forms"][kind]} - used
            others += [{"prompt": p, "check": check, "kind": kind} for p in sorted(prompts)]
    random.Random(1).shuffle(others)
    paths = folder / "train.jsonl", folder / "others.jsonl"
    for path, lines in zip(paths, (rows, others)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def measured(folder, text, output):
    """Returns {context: (right answers, tasks)} and the bits per byte of a text."""
    tasks = [r for r in single_rows("sft_val.jsonl") if r["kind"] not in TABLES["talk"]]
    model, tokenizer = open_model(folder, "cpu")
    output.mkdir(parents=True, exist_ok=True)
    others, figures = rows_of(calculations(output)[1]), {}
    groups = {"calculations": (others, [[] for _ in others])}
    groups |= {name: (tasks, before) for name, before in contexts(tasks).items()}
    for name, (rows, before) in groups.items():
        chats = [chat + [user(row["prompt"])] for chat, row in zip(before, rows)]
        texts = answers(model, tokenizer, chats)
        figures[name] = [sum(passes(r["check"], t) for r, t in zip(rows, texts)), len(rows)]
    program("eval", model_path=folder, perplexity_path=text, skip_boolq="true", output_dir=output)
    results = json.loads((Path(output) / "results.json").read_text(encoding="utf-8"))
    return figures, results["perplexity"]["bits_per_byte"]


def trained(args, name, model, rows, held_out, **flags):
    """Trains with configs/grpo.json; returns (its folder, its steps' and validations' records)."""
    out = args.output / name.replace(" ", "_").replace(",", "").replace("/", "by")
    if not (out / "final").exists():
        flags = {"output_dir": out, "resume_from_checkpoint": "auto"} | flags
        paths = {"model_path": model, "dataset_path": rows, "val_path": held_out}
        steps = {"max_minutes": "none", "max_steps": args.max_steps}
        box = steps if args.max_steps else {"max_minutes": args.minutes}
        program("grpo", "configs/grpo.json", **box, **paths, **flags)
    records = rows_of(out / "metrics.jsonl")
    return out, [r for r in records if "lr" in r], [r for r in records if "val_pass@1" in r]


def learn(args, name, seeds, reward="right", **flags):
    """Returns the line of some runs that differ in their seed only."""
    totals, bits, runs = {}, [], []
    for seed in seeds:
        paths = calculations(args.output)
        out, steps, held_out = trained(
            args, f"{name} {seed}", args.model, *paths, seed=seed, reward=reward, **flags
        )
        figures, nats = measured(out, args.text, out / "evaluation")
        bits.append(nats)
        for context, (right, count) in figures.items():
            before = totals.get(context, (0, 0))
            totals[context] = before[0] + right, before[1] + count
        keys = "reward", "no_signal", "length", "entropy"
        first, last = ({k: round(r[k], 4) for k in keys} for r in (steps[0], steps[-1]))
        runs.append({"seed": seed, "steps": steps[-1]["step"], "first": first, "last": last})
        runs[-1]["held out"] = [
            {k: v for k, v in r.items() if k.startswith("val_") or k == "step"} for r in held_out
        ]
    n = len(runs)
    line = {name: share(right / n, count / n) for name, (right, count) in totals.items()}
    return line | {"bits per byte": bits, "runs": runs}


def before(args):
    figures, bits = measured(args.model, args.text, args.output / "before")
    return {name: share(*pair) for name, pair in figures.items()} | {"bits per byte": [bits]}


# ---- arithmetic


def sums(top, count):
    """Returns rows for SFT, as many others for grpo.py, and up to 300 held out: different sums."""
    chance = random.Random(top)
    pairs = {(chance.randrange(top), chance.randrange(top)) for _ in range(5 * count)}
    pairs = sorted(pairs)
    chance.shuffle(pairs)
    row = lambda a, b: {"prompt": f"{a} + {b} =", "response": str(a + b), "answer": a + b}
    rows = [row(*pair) for pair in pairs]
    return rows[:count], rows[count : 2 * count], rows[2 * count :][:300]


def arithmetic(args, top):
    """Returns the line of one difficulty: SFT up to args.low, then reinforcement learning."""
    folder, files = args.output / f"sums_{top}", []
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("sft", "rl", "val"), sums(top, LEVELS[top])):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps, model, held_out, accuracy = 25, args.model, rows_of(files[2]), 0.0
    while accuracy < args.low and steps <= 3200:
        out = folder / f"sft_{steps}"
        if not (out / "final").exists():
            flags = {"model_path": args.model, "dataset_path": files[0], "val_path": files[2]}
            program("sft", "configs/demo_sft.json", max_steps=steps, output_dir=out, **flags)
        model = out
        accuracy = accuracy_on(model, held_out)
        steps *= 2
    flags = {"max_new_tokens": 8}
    out, taken, _ = trained(args, f"sums_{top}/grpo", model, *files[1:], **flags)
    line = {"below": top, "sft steps": steps // 2, "steps": taken[-1]["step"]}
    for name, right in ("after SFT", accuracy), ("after RL", accuracy_on(out, held_out)):
        line[name] = share(right * len(held_out), len(held_out))
    return line | {"held out": len(held_out)}


def accuracy_on(model, rows):
    """Returns the share of rows whose greedy answer is the very response."""
    texts = answers(*open_model(model, "cpu"), [[user(row["prompt"])] for row in rows])
    return sum(text == row["response"] for text, row in zip(texts, rows)) / len(rows)


# ---- speed


def ours_speed(args):
    """Prints the tokens per second of grpo.py, validations left out."""
    out = args.output / f"speed_{os.getpid()}"
    sizes = {"max_steps": args.steps, "max_minutes": "none", "eval_steps": 1000000, "eval_rows": 1}
    paths = {"model_path": args.model, "dataset_path": ROOT / "data/samples/sft_train.jsonl"}
    same = {"output_dir": out, "logging_steps": 1} | DR_GRPO  # as trl is asked
    program("grpo", "configs/grpo.json", **same, **sizes, **paths)
    steps = [record for record in rows_of(out / "metrics.jsonl") if "lr" in record]
    first, last = steps[2], steps[-1]  # the first ones allocate
    rate = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    print(json.dumps({"tokens per second": round(rate), "reward": last["reward"]}))


def trl_speed(args):
    """Prints those of trl's GRPOTrainer with the sizes of configs/grpo.json."""
    import datasets
    import transformers
    import trl

    preset = json.loads((ROOT / "configs/grpo.json").read_text(encoding="utf-8"))
    rows = [r for r in rows_of(ROOT / "data/samples/sft_train.jsonl") if "prompt" in r]
    rows = [{"prompt": [user(r["prompt"])], "check": json.dumps(r["check"])} for r in rows]
    marks = []

    def score(completions, check, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [float(passes(json.loads(c), text)) for c, text in zip(check, texts)]

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            marks.append((time.perf_counter(), state.num_input_tokens_seen))

    folder = args.model / "final"
    settings = {"num_generations": preset["num_generations"], "max_steps": args.steps, "beta": 0.0}
    settings |= {"max_completion_length": preset["max_new_tokens"], "loss_type": "dr_grpo"}
    rows_a_step = preset["batch_size"] * preset["num_generations"]
    settings |= {"per_device_train_batch_size": rows_a_step, "report_to": "none", "use_cpu": True}
    settings |= {"bf16": False, "gradient_checkpointing": False, "scale_rewards": False}
    settings |= {"learning_rate": preset["learning_rate"], "save_strategy": "no"}
    trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=score,
        args=trl.GRPOConfig(output_dir=str(args.output / "trl"), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[Marks()],
    ).train()
    (start, first), (end, last) = marks[2], marks[-1]
    print(json.dumps({"tokens per second": round((last - first) / (end - start))}))


def speed(args):
    """Returns medians over three rounds, which alternate."""
    rates = {"ours_speed": [], "trl_speed": []}
    for turn in range(3):
        for name in sorted(rates, reverse=turn % 2 == 1):
            words = [sys.executable, __file__, args.model, f"--parts={name}"]
            words += [f"--output_dir={args.output}", f"--steps={args.steps}"]
            done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
            rates[name].append(json.loads(done.stdout.splitlines()[-1])["tokens per second"])
    ours, trl = (statistics.median(values) for values in rates.values())
    return {"ours": ours, "trl": trl, "times": round(ours / trl, 2), "rounds": rates}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, help="a whole training of sft.py, as checkpoints/sft/demo"
    )
    parser.add_argument("--parts", default="learn,choices,arithmetic,speed")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--max_steps", type=int, help="in place of minutes, on a busy machine")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=20, help="of the part speed")
    parser.add_argument("--low", type=float, default=0.2, help="share of sums at which SFT stops")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--output_dir", dest="output", type=Path, default=ROOT / "evaluation_results/grpo"
    )
    args = parser.parse_args()
    args.model, args.output = args.model.resolve(), args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.parts in ("ours_speed", "trl_speed"):
        return {"ours_speed": ours_speed, "trl_speed": trl_speed}[args.parts](args)
    (args.output / "coins.py").write_text(COINS, encoding="utf-8")
    seeds, coins = [int(s) for s in args.seeds.split(",")], f"{args.output / 'coins.py'}:score"
    runs = {"learn": {"before": lambda: before(args), "right": lambda: learn(args, "right", seeds)}}
    runs["learn"]["coins"] = lambda: learn(args, "coins", seeds, reward=coins)
    runs["choices"] = {
        name: lambda name=name, flags=flags: learn(args, name, seeds[:1], **flags)
        for name, flags in CHOICES.items()
    }
    runs["arithmetic"] = {
        f"sums below {top}": lambda top=top: arithmetic(args, top) for top in LEVELS
    }
    runs["speed"] = {"speed": lambda: speed(args)}
    path = args.output / "results.jsonl"
    done = {line["run"] for line in rows_of(path)} if path.exists() else set()
    for part in args.parts.split(","):
        for name, run in runs[part].items():
            if name not in done:
                line = json.dumps({"run": name, "part": part, "minutes": args.minutes} | run())
                print(line, flush=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
