"""Data preparation: `python data.py` against the method of the project it follows, written again.

    python benchmarks/data_speed.py                                   everything, on ../shared/data
    python benchmarks/data_speed.py --items=speed --limit=3000 --rounds=1 --sample=0.5
    python benchmarks/data_speed.py --items=index --documents=8000000

Needs Linux; `speed` needs langdetect and datasketch: all of corpora/ as one file of rows, one and
two processes, pinned to as many cores. `clean+filter+dedup` ends where the command says that it
trains a tokenizer, `whole` is the command with a tokenizer that exists; both count from its start.
The other method is one process: ftfy, regexes, langdetect on each document, SHA-256, a MinHash
updated shingle by shingle and datasketch's LSH, then an encode call for each document and rows of
ids in JSON. It is slow, so it gets every n-th document, --sample MB in all, and its start does not
count. Programs take turns, in reverse order every second round. MB are of raw text. Memory is the
largest sum of PSS over the command and its children. `parent`: what the parent alone can do,
however many workers clean for it: documents and MB of raw text for each second of its CPU, up to
the tokenizer; `--workers=ray://HOST:10001` counts a cluster's messages in. `index`: memory and time
of the deduplication index for random documents. `dedup`: labelled pairs that lose their second
document. `langid`: labelled texts that are not rejected for their language. One JSON line is
printed.
"""

import argparse
import functools
import gzip
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data"


# ---- the other method


URL = re.compile(r"https?://\S+|www\.\S+")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def other_clean(text):
    import ftfy

    text = ftfy.fix_text(text)
    for pattern in (URL, CODE, CONTROL):
        text = pattern.sub("", text)
    return re.sub(r"\s+", " ", text).strip()


def other_keeps(text):
    from langdetect import LangDetectException, detect

    try:
        return 50 <= len(text) <= 10_000 and detect(text) == "en"
    except LangDetectException:
        return False


def other_deduplicates(texts):
    from datasketch import MinHash, MinHashLSH

    lsh, seen, kept = MinHashLSH(threshold=0.8, num_perm=128), set(), []
    for text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        minhash, packed = MinHash(num_perm=128), text.lower().replace(" ", "")
        for shingle in {packed[i : i + 3] for i in range(len(packed) - 2)}:
            minhash.update(shingle.encode())
        if not lsh.query(minhash):
            lsh.insert(str(len(kept)), minhash)
            kept.append(text)
    return kept


def other_method(rows, model, output):
    """Prints {"clean+filter+dedup": seconds, "whole": seconds}; everything is held in memory, as it
    was.
    """
    import sentencepiece

    began = time.perf_counter()
    with open(rows, encoding="utf-8") as file:
        texts = [other_clean(json.loads(line)["text"]) for line in file]
    kept = other_deduplicates([text for text in texts if other_keeps(text)])
    middle = time.perf_counter()
    tokenizer, ids = sentencepiece.SentencePieceProcessor(model_file=str(model)), []
    for text in kept:
        ids += tokenizer.encode(text)
    blocks = [ids[i : i + 1024] for i in range(0, len(ids), 1024)]
    with open(output, "w", encoding="utf-8") as file:
        for block in blocks:
            file.write(json.dumps({"input_ids": block, "labels": block}) + "\n")
    print(json.dumps({"clean+filter+dedup": middle - began, "whole": time.perf_counter() - began}))


# ---- processes, and what they hold


def tree(root):
    """The ids of a process and of all its descendants."""
    children, found = defaultdict(list), [root]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(
                int(path.parent.name)
            )
        except OSError:  # it has ended meanwhile
            continue
    for process in found:
        found += children[process]
    return found


def pss(process):
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1])
    except (OSError, TypeError):
        return 0


class Command:
    """A Python command on some cores of its own; its memory is sampled while it runs."""

    def __init__(self, words, cores):
        self.began, self.peak = time.perf_counter(), 0
        pin = sorted(os.sched_getaffinity(0))[:cores]
        environment = os.environ | {"OMP_NUM_THREADS": str(cores), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, pin),
            start_new_session=True,
        )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while self.process.poll() is None:
            self.peak = max(self.peak, sum(map(pss, tree(self.process.pid))))
            time.sleep(0.1)

    def until(self, words):
        """Wait for a line that begins with `words`, and end the command there; returns its
        seconds.
        """
        for line in self.process.stdout:
            if line.startswith(words):
                break
        seconds = time.perf_counter() - self.began
        os.killpg(self.process.pid, 9)
        self.process.wait()
        return seconds

    def output(self):
        """Wait for the end; returns (seconds, stdout, exit status, stderr)."""
        out, error = self.process.communicate()
        return time.perf_counter() - self.began, out, self.process.returncode, error


def data_py(rows, output, cores, *flags):
    words = [f"--input_path={rows}", f"--output_dir={output}", f"--workers={cores}", *flags]
    return Command(["data.py", *words], cores)


# ---- what is measured


def corpora(limit):
    """The raw texts of all corpora, in turn; `limit` of them, evenly, or all."""
    texts = []
    for path in sorted((DATA / "corpora").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts[:: max(1, len(texts) // limit)][:limit] if limit else texts


def write_rows(path, texts):
    """Returns the path and its MB of raw text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path, sum(len(text.encode()) for text in texts) / 1e6


def speed(place, args):
    """MB/s of each program at both stages, median, min and max over rounds; memory; ratios."""
    texts = corpora(args.limit)
    rows, size = write_rows(place / "all.jsonl", texts)
    stride = max(1, round(size / args.sample))
    sample, sample_size = write_rows(place / "sample.jsonl", texts[::stride])
    model, vocabulary = place / "tokenizer.model", f"--vocab_size={args.vocab_size}"
    known = f"--tokenizer_path={model}"
    _, _, status, error = data_py(rows, place / "first", 2, known, vocabulary).output()
    assert status == 0, error
    rates, memory = defaultdict(list), defaultdict(int)

    def ours(cores, number):
        name, folder = f"ours, {cores} processes", place / f"{cores}.{number}"
        command = data_py(rows, f"{folder}.a", cores, vocabulary)
        rates[f"{name}: clean+filter+dedup"].append(size / command.until("training a tokenizer"))
        command = data_py(rows, f"{folder}.b", cores, known, vocabulary)
        seconds, _, status, error = command.output()
        assert status == 0, error
        rates[f"{name}: whole"].append(size / seconds)
        memory[name] = max(memory[name], command.peak)

    def other(number):
        name = "the other method"
        command = Command(
            [__file__, "--other", str(sample), str(model), f"{place}/other.{number}"], 1
        )
        _, out, status, error = command.output()
        assert status == 0, error
        for stage, seconds in json.loads(out).items():
            rates[f"{name}: {stage}"].append(sample_size / seconds)
        memory[f"{name}, of its sample"] = max(memory[f"{name}, of its sample"], command.peak)

    for number in range(args.rounds):
        programs = [other, functools.partial(ours, 1), functools.partial(ours, 2)]
        for program in programs[:: 1 if number % 2 else -1]:
            program(number)
    figures = {n: [round(f(v), 3) for f in (statistics.median, min, max)] for n, v in rates.items()}
    ratios = {
        f"{cores} processes: {stage}": round(
            figures[f"ours, {cores} processes: {stage}"][0]
            / figures[f"the other method: {stage}"][0],
            1,
        )
        for cores in (1, 2)
        for stage in ("clean+filter+dedup", "whole")
    }
    return {
        "documents": len(texts),
        "MB": round(size, 2),
        "sample MB": round(sample_size, 2),
        "MB/s": figures,
        "times the other method": ratios,
        "peak MB": {name: round(value / 1e6, 1) for name, value in memory.items()},
        "bytes per token": json.loads((place / "first" / "stats.json").read_text()).get(
            "bytes_per_token"
        ),
    }


def parent_share(words):
    """Prepares a dataset and prints the parent's CPU seconds up to the tokenizer: the child's
    side.
    """
    from corpus import prepare
    from lib.config import configure

    def timed(cfg, progress):
        began = time.process_time()
        collect(cfg, progress)
        print(json.dumps({"seconds": time.process_time() - began}), flush=True)

    collect, prepare.collect = prepare.collect, timed
    prepare.main(configure(prepare.DataConfig, words))


def parent(place, args):
    """Documents and MB that one second of the parent's CPU reads, judges and writes."""
    texts = corpora(args.limit)
    rows, size = write_rows(place / "all.jsonl", texts)
    words = [f"--input_path={rows}", f"--output_dir={place}/d", f"--workers={args.workers}"]
    command = Command([__file__, "--parent", *words, "--vocab_size=4096"], os.cpu_count())
    _, out, status, error = command.output()
    assert status == 0, error
    seconds = json.loads(next(line for line in out.splitlines() if line[:1] == "{"))["seconds"]
    rates = {"documents/s": round(len(texts) / seconds), "MB/s": round(size / seconds, 2)}
    return {"workers": args.workers, "documents": len(texts), "MB": round(size, 2), **rates}


def index_growth(folder, documents):
    """Prints what an index of so many random documents takes: the child's side."""
    from corpus.dedup import PERMUTATIONS, Index
    from corpus.prepare import reopen

    random, batch = np.random.default_rng(1), 1024
    files = [reopen(Path(folder, name), 0) for name in ("digests.bin", "signatures.bin")]
    index, spent, peak, judged = Index(*files, 0.8), 0, 0, 0
    before = pss(os.getpid())
    while judged < documents:
        digests = random.integers(0, 2**64, batch, np.uint64)
        signatures = random.integers(0, 2**32, (batch, PERMUTATIONS), np.uint32)
        began = time.process_time()
        index.judge(digests, signatures)
        spent += time.process_time() - began
        judged += batch
        if judged % (batch * 16) == 0:
            peak = max(peak, pss(os.getpid()) - before)
    on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    arrays = sum(run.nbytes for runs in (index.distinct, *index.bands) for run in runs.runs)
    figures = {"arrays": arrays / judged, "growth": peak / judged}
    bytes_each = {name: round(value, 1) for name, value in figures.items()}
    result = {
        "documents": judged,
        "bytes a document": bytes_each | {"disk": on_disk / judged},
    }
    projection = round(8e6 * peak / judged / 1e9, 2)
    print(
        json.dumps(
            result | {"microseconds": round(1e6 * spent / judged, 1), "GB of 8M": projection}
        )
    )


def index(place, args):
    """Memory and time of the index by document, in a process of its own."""
    (place / "index").mkdir()
    words = [__file__, "--index", str(place / "index"), f"--documents={args.documents}"]
    _, out, status, error = Command(words, 1).output()
    assert status == 0, error
    return json.loads(out)


def dedup(place, args):
    """Which of the labelled pairs lose their second document, by exact Jaccard similarity of word
    5-grams.
    """
    from corpus.dedup import Index, minhash, sha256
    from corpus.prepare import reopen

    with gzip.open(DATA / "dedup" / "docs.dev.jsonl.gz", "rt", encoding="utf-8") as file:
        docs = {row["id"]: row["text"] for row in map(json.loads, file)}
    texts = list(docs.values())
    prints = dict(zip(docs, zip(sha256(texts), minhash(texts, 42), strict=True), strict=True))
    goes = defaultdict(list)
    for number, line in enumerate((DATA / "dedup" / "pairs.dev.jsonl").read_text().splitlines()):
        pair, folder = json.loads(line), place / f"pair{number}"
        folder.mkdir()
        digests, signatures = map(np.stack, zip(prints[pair["a"]], prints[pair["b"]], strict=True))
        low = next(edge for edge in (0.9, 0.8, 0.7, 0.0) if pair["w5"] >= edge)
        index = Index(reopen(folder / "digests", 0), reopen(folder / "signatures", 0), 0.8)
        goes[f"similarity from {low}"].append(index.judge(digests, signatures)[1] is not None)
    return {
        name: {"pairs": len(v), "removed": round(sum(v) / len(v), 4)}
        for name, v in sorted(goes.items())
    }


def langid(place, args):
    """The share that the language filter of data.py keeps, by kind: what it rejects is in its
    stats.json.
    """
    groups = defaultdict(list)
    for line in (DATA / "langid" / "dev.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["is_english"] is not None:
            kind = "English" if row["is_english"] else "foreign"
            groups[f"{kind}, all"].append(row["text"])
            groups[f"{kind}, {row['genre']}"].append(row["text"])
    filler = [
        f"This is number {n} of the texts that are there so that none of the runs is empty."
        for n in range(9)
    ]
    lenient = ["--min_length=0", "--max_length=10000000", "--no_use_minhash", "--vocab_size=4000"]
    lenient += [f"--tokenizer_path={place}/tokenizer.model"]
    rows, _ = write_rows(place / "all.jsonl", [text for texts in groups.values() for text in texts])
    _, _, status, error = data_py(rows, place / "all", 2, "--language=off", *lenient).output()
    assert status == 0, error
    result = {}
    for number, (name, texts) in enumerate(sorted(groups.items())):
        folder = place / f"langid{number}"
        rows, _ = write_rows(folder.with_suffix(".jsonl"), filler + texts)
        _, _, status, error = data_py(rows, folder, 2, *lenient).output()
        assert status == 0, error
        dropped = json.loads((folder / "stats.json").read_text())["documents"]["dropped"]
        reasons = {
            name: entry["count"] for stage in dropped.values() for name, entry in stage.items()
        }
        kept = 1 - reasons.get("not-english", 0) / len(texts)
        result[name] = {"texts": len(texts), "kept": round(kept, 4)}
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="speed,index,dedup,langid")
    parser.add_argument("--limit", type=int, default=0, help="documents of the corpora; 0 = all")
    parser.add_argument("--sample", type=float, default=2.0, help="MB for the other method")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument(
        "--documents", type=int, default=1_000_000, help="random documents for the index"
    )
    parser.add_argument(
        "--other", nargs=3, help=argparse.SUPPRESS
    )  # the child's side: rows, tokenizer, output
    parser.add_argument("--workers", default="2", help="of `parent`")
    parser.add_argument("--index", help=argparse.SUPPRESS)  # the child's side: folder
    if sys.argv[1:2] == ["--parent"]:
        return parent_share(sys.argv[2:])
    args = parser.parse_args()
    if args.other:
        return other_method(*args.other)
    if args.index:
        return index_growth(args.index, args.documents)
    measures = {"speed": speed, "parent": parent, "index": index, "dedup": dedup, "langid": langid}
    result = {}
    for item in args.items.split(","):
        with tempfile.TemporaryDirectory() as place:
            result[item] = measures[item](Path(place), args)
    print(
        json.dumps(
            result
            | {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        )
    )


if __name__ == "__main__":
    main()
