"""Does alignment align? SFT and DPO by their commands, and what base, SFT and DPO model then do.

    python benchmarks/align.py --base=checkpoints/pretrain/corpora/final --part=instructions
    python benchmarks/align.py --base=... --part=preferences   begins from the SFT of `instructions`
    python benchmarks/align.py --base=... --part=tasks           the sample datasets of data.py

`instructions`: SFT on instruction rows, then on rows it has not seen the loss of the answers and
the share of answers that the model ends by itself. `preferences`: DPO, then on held-out pairs how
often the chosen answer gained more than the rejected one, and what became of the chosen answers'
log-probability. `tasks`: SFT and DPO on `create_sample_datasets`, then the share of held-out tasks
whose answer a program finds right. Every model is asked in the chat template, greedily. Further
flags go to sft.py and dpo.py as --sft.KEY=VALUE and --dpo.KEY=VALUE. One JSON line is printed for
each model.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from corpus.chats import read_chats
from corpus.report import Tally
from corpus.samples import passes
from data import supervised_rows
from lib.conversation import render, stop_ids
from lib.runtime import to_device
from model import next_token_loss
from sample import Request, Sampling, generate, open_model
from sft import split_rows

SHARED = ROOT.parent / "shared/data"
INSTRUCTIONS, PAIRS = SHARED / "sft/[lw]*_*.jsonl*", SHARED / "dpo/lfs_preference_1100.jsonl"
SAMPLES = ROOT / "data/samples"
CPU = torch.device("cpu")
HELD_OUT, TEMPLATE, ANSWER = 0.05, "chatml", 96  # share of rows, template, longest answer in tokens


def train(script, model, data, out, *flags):
    """Runs a training command as a user would; what it says goes to stderr."""
    command = [sys.executable, f"{script}.py", f"configs/{script}.json", f"--model_path={model}"]
    command += [f"--dataset_path={data}", f"--output_dir={out}", *flags]
    print("$", *command[1:], file=sys.stderr)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


# ---- what a model does


def answer_loss(model, tokenizer, chats):
    """Returns nats per token of the answers (and their ends) of conversations."""
    nats, count, length = 0.0, 0, model.cfg.sequence_length
    rendered = [[np.array(half) for half in render(tokenizer, chat, TEMPLATE)] for chat in chats]
    rows = [
        [(ids[: length + 1], mask[: length + 1])]
        for ids, mask in rendered
        if mask[: length + 1].any()
    ]
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            batch = supervised_rows(rows[start : start + 16], length, tokenizer.pad_id)
            nats += next_token_loss(model, to_device(batch, CPU))[0].item()
            count += batch["count"]
    return nats / count


def answers(model, tokenizer, chats):
    """Returns [(text, ended by itself?)]: the greedy answers to the first questions of
    conversations.
    """
    ends, given = stop_ids(tokenizer, TEMPLATE), []
    for start in range(0, len(chats), 32):
        requests = []
        for chat in chats[start : start + 32]:
            first = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
            prompt, _ = render(tokenizer, chat[:first], TEMPLATE, add_generation_prompt=True)
            requests.append(Request(prompt, ANSWER, Sampling(temperature=0), ends))
        for _ in generate(model, requests):
            pass
        given += [(tokenizer.decode(r.ids).strip(), r.finish == "stop") for r in requests]
    return given


def report(part, name, folder, chats, rows=()):
    """Prints what the model in `folder` does with held-out conversations; `rows` say how to check
    answers.
    """
    model, tokenizer = open_model(folder, "cpu")
    given = answers(model, tokenizer, chats)
    line = {"part": part, "model": name, "prompts": len(chats)}
    line["answer_loss"] = round(answer_loss(model, tokenizer, chats), 4)
    line["ends_by_itself"] = round(sum(ended for _, ended in given) / len(given), 4)
    if rows:
        right = [row["kind"] for row, (text, _) in zip(rows, given) if passes(row["check"], text)]
        line["right"] = round(len(right) / len(rows), 4)
        counts, of = Counter(right), Counter(row["kind"] for row in rows)
        line["right_by_kind"] = {kind: f"{counts[kind]} of {of[kind]}" for kind in sorted(of)}
    line["answers"] = [
        [chat[-2]["content"][:80], text[:80]] for chat, (text, _) in zip(chats[:4], given)
    ]
    print(json.dumps(line, ensure_ascii=False), flush=True)


# ---- the three parts


def instructions(base, work, flags):
    held_out = f"--val_ratio={HELD_OUT}"
    train("sft", base, INSTRUCTIONS, work / "sft", held_out, *flags["sft"])
    _, chats = split_rows(read_chats(str(INSTRUCTIONS), Tally()), HELD_OUT, "messages")
    chats = [chat["messages"] for chat in chats[:: max(1, len(chats) // 300)]]
    for name, folder in (("base", base), ("sft", work / "sft/final")):
        report("instructions", name, folder, chats)


def preferences(base, work, flags):
    train("dpo", work / "sft/final", PAIRS, work / "dpo", "--val_ratio=0.2", *flags["dpo"])
    for line in (work / "dpo/metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = {
            k.removeprefix("val_"): v
            for k, v in json.loads(line).items()
            if k == "step" or "val_" in k
        }
        if len(line) > 1:
            print(json.dumps({"part": "preferences"} | line), flush=True)


def tasks(base, work, flags):
    subprocess.run(
        [sys.executable, "data.py", "create_sample_datasets"], cwd=ROOT, stdout=sys.stderr
    )
    sft, dpo = work / "tasks_sft", work / "tasks_dpo"
    train(
        "sft",
        base,
        f"{SAMPLES}/sft_train.jsonl",
        sft,
        f"--val_path={SAMPLES}/sft_val.jsonl",
        *flags["sft"],
    )
    pairs = f"--val_path={SAMPLES}/dpo_val.jsonl"
    train("dpo", sft / "final", f"{SAMPLES}/dpo_train.jsonl", dpo, pairs, *flags["dpo"])
    lines = (SAMPLES / "sft_val.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "prompt" in row]  # no conversations
    chats = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows
    ]
    for name, folder in (("base", base), ("sft", sft / "final"), ("dpo", dpo / "final")):
        report("tasks", name, folder, chats, rows)


PARTS = {part.__name__: part for part in (instructions, preferences, tasks)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("checkpoints/align"))
    parser.add_argument("--part", choices=PARTS, required=True)
    args, rest = parser.parse_known_args()
    flags = {script: [f"--{f.split('.', 1)[1]}" for f in rest if f.startswith(f"--{script}.")]
             for script in ("sft", "dpo")}  # fmt: skip
    if len(rest) != sum(map(len, flags.values())):
        parser.error(
            f"not understood: {rest}; flags of the trainings are --sft.KEY=VALUE, --dpo.KEY=VALUE"
        )
    PARTS[args.part](args.base.resolve(), args.work.resolve(), flags)


if __name__ == "__main__":
    main()
