"""What results say: report.md, several models side by side, one against what its size is expected to reach.

Pure functions of what eval.py wrote into results.json. Ranges by size lie in configs/eval/expected.json, each
with its source: a claim of somebody's README is called one.
"""

import math
from pathlib import Path
from typing import NamedTuple

from lib.config import UserError, read_object


def dig(results, *keys):
    """Returns what lies at this place of nested objects, None if nothing does."""
    for key in keys:
        results = results.get(key) if isinstance(results, dict) else None
    return results


class Metric(NamedTuple):
    """A number of results.json: its place, how it is shown, and which end of a range is the good one."""

    name: str
    place: tuple[str, ...]
    form: str
    lower_is_better: bool = False

    def of(self, results):
        """Returns the number, None where it was not measured."""
        value = dig(results, *self.place)
        return value if type(value) in (int, float) and math.isfinite(value) else None

    def shown(self, value):
        if value is None:
            return "not measured"
        return f"{value:.3g}" if self.form == ",.2f" and value >= 1e5 else format(value, self.form)


METRICS = (
    Metric("bits per byte", ("perplexity", "bits_per_byte"), ".4f", True),
    Metric("word perplexity", ("perplexity", "word_perplexity"), ",.2f", True),
    Metric("token perplexity", ("perplexity", "token_perplexity"), ",.2f", True),
    Metric("BoolQ accuracy", ("boolq", "accuracy"), ".1%"),
    Metric("BoolQ, calibrated", ("boolq", "calibrated_accuracy"), ".1%"),
    Metric("smoke score", ("smoke", "score"), ".3f"),
    Metric("ends by itself", ("smoke", "eos_rate"), ".1%"),
)
HEAD = ("metric", "value", "to compare", "verdict")
BESIDE = ("unigram", "xz")  # the baselines worth a place in the headline


# ----------------------------------------------------------------------------------------------
# One model: the report


def lines_of(results):
    """Returns the headline numbers as rows of HEAD."""
    rows, part = [], results["perplexity"]
    if "baselines" in part:
        for metric in METRICS[:3]:
            beside = [
                f"{name} {metric.shown(part['baselines'][name][metric.place[1]])}"
                for name in BESIDE
            ]
            rows.append([metric.name, metric.shown(metric.of(results)), ", ".join(beside), ""])
        rows[0][3] = part["verdict"]
    else:
        rows.append(["perplexity", "not measured", "", part["reason"]])
    rows += question_lines("BoolQ", results["boolq"])
    for path, task in results.get("tasks", {}).items():
        rows += question_lines(Path(path).name, task)
    score, ends = METRICS[5], METRICS[6]
    rows.append(
        [
            score.name,
            score.shown(score.of(results)),
            "",
            f"{len(results['smoke']['responses'])} prompts",
        ]
    )
    rows.append([ends.name, ends.shown(ends.of(results)), "", "responses that were not cut off"])
    return rows


def question_lines(name, task):
    """Returns the rows of one task."""
    if "accuracy" not in task:
        return [[name, "not measured", "", task["reason"]]]
    rows = [
        [
            f"{name} accuracy",
            with_doubt(task["accuracy"], task["ci95"]),
            f"n {task['n']:,}",
            task["verdict"],
        ]
    ]
    if "majority" in task:
        rows[0][2] = f"majority {task['majority']:.1%}, n {task['n']:,}"
        rows.append([f"{name}, by the character", f"{task['accuracy_norm']:.1%}", "", ""])
    if task.get("calibrated_accuracy") is not None:
        said = ", ".join(f"{name!r} {count:,}" for name, count in task["predicted"].items())
        calibrated = with_doubt(task["calibrated_accuracy"], task["calibrated_ci95"])
        told = f"{task['calibrated_verdict']}; uncalibrated it answered {said}"
        rows.append([f"{name}, calibrated", calibrated, "", told])
    if "perplexity" in task:
        rows.append(
            [f"{name}, perplexity of the word", METRICS[2].shown(task["perplexity"]), "", ""]
        )
    if task["cut"]:
        rows[0][3] += f"; {task['cut']:,} contexts lost their beginning"
    return rows


def with_doubt(share, interval):
    return f"{share:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def aligned(rows):
    """Returns rows of texts as lines with straight columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def table(rows):
    """Returns rows of texts, the first the head, as a table in markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def headline(results):
    """Returns the headline numbers for a terminal, the verdicts below them."""
    rows = lines_of(results)
    verdicts = [f"{name}: {verdict}" for name, _, _, verdict in rows if verdict]
    return "\n".join([aligned([HEAD[:3], *(row[:3] for row in rows)]), "", *verdicts])


def markdown(results, smoke_table, detailed=False, picture=False):
    """Returns report.md. smoke_table: smoke.table's; `detailed` adds every response, `picture` report.png."""
    model, smoke = results["model"], results["smoke"]
    about = (
        f"{model['non_embedding']:,} parameters without embeddings, {model['parameters']:,} in all"
    )
    parts = [
        f"# {model['name']}: evaluation",
        f"`{model['path']}` - {about}, weights {model['sha256'][:12]}",
    ]
    if results["protocol"]["fast_mode"]:
        parts.append(
            "**Fast mode: parts of the data only. Not to be compared with full evaluations.**"
        )
    parts += [table([HEAD, *lines_of(results)]), *(["![](report.png)"] if picture else [])]
    distinct = ", ".join(f"distinct-{n} {value:.2f}" for n, value in smoke["distinct_n"].items())
    if "baselines" in results["perplexity"]:
        parts += ["## Perplexity", perplexity_table(results), text_of(results["perplexity"])]
    parts += [
        "## Smoke prompts",
        f"{distinct}; {smoke['tokens_per_second']:,.0f} tokens/s",
        smoke_table,
    ]
    parts += [
        "## How it was measured",
        "\n".join(f"- {k}: {v}" for k, v in results["protocol"].items()),
    ]
    if detailed:
        parts += ["## Responses", *map(response, smoke["responses"])]
    return "\n\n".join(parts) + "\n"


def perplexity_table(results):
    """Returns the model among the baselines, the best first."""
    part, metrics = results["perplexity"], METRICS[:3]
    values = part["baselines"] | {f"**{results['model']['name']}**": part}
    rows = [
        [name, *(metric.shown(value[metric.place[1]]) for metric in metrics)]
        for name, value in sorted(values.items(), key=lambda item: item[1]["bits_per_byte"])
    ]
    return table([["", *(metric.name for metric in metrics)], *rows])


def text_of(part):
    """Returns what was scored, and in which windows."""
    text = part["text"]
    return (
        f"{text['name'] or text['path']}, {text['part']}: {part['bytes']:,} bytes, {part['words']:,} words, "
        f"{part['lines']:,} lines, {part['tokens']:,} tokens of {part['bytes_per_token']:.2f} bytes. "
        f"Context {part['context']:,}, stride {part['stride']:,}. sha256 `{text['sha256']}`"
    )


def response(row):
    """Returns one prompt of the smoke test with what came of it."""
    parts = ", ".join(
        f"{name} {value:.2f}" for name, value in row["parts"].items() if value is not None
    )
    quoted = "\n".join(f"    {line}" for line in row["response"].splitlines()) or "    (nothing)"
    head = f"**{row['category']}: {row['score']:.2f}** ({parts}; {row['finish']})"
    asked = "\n".join(f"> {line}" for line in row["prompt"].strip().splitlines())
    return f"{head}\n\n{asked}\n\n{quoted}"


def draw(results, path):
    """Draws bits per byte beside the baselines, and smoke scores, if matplotlib is there. Returns whether."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    part, figure = results["perplexity"], Figure(figsize=(9, 3.2), layout="constrained")
    bars = {name: base["bits_per_byte"] for name, base in part.get("baselines", {}).items()}
    panels = [("smoke score", results["smoke"]["by_category"], 1.0)]
    if bars:
        panels.insert(
            0, ("bits per byte", bars | {results["model"]["name"]: part["bits_per_byte"]}, None)
        )
    for axes, (title, values, limit) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        colors = ["0.75"] * (len(values) - 1) + ["C0"] if title == "bits per byte" else "C0"
        marks = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(marks, fmt="%.2f", padding=3)
        axes.set(title=title, xlim=(0, limit or 1.15 * max(values.values())))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


# ----------------------------------------------------------------------------------------------
# Files of results


def read_results(path):
    """Returns the results in a file, or in the results.json of a folder; UserError if they are none."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    results = read_object(str(path))
    model, parts = results.get("model"), ("perplexity", "boolq", "smoke")
    if not isinstance(model, dict) or not all(
        isinstance(results.get(part), dict) for part in parts
    ):
        expected = f"objects 'model', {', '.join(map(repr, parts))}"
        raise UserError(f"{path}: not results of eval.py: expected the {expected}")
    size = model.get("non_embedding")
    if type(size) is not int or size < 1:
        raise UserError(
            f"{path}: model.non_embedding must be a count of parameters, got {size!r:.40}"
        )
    try:
        lines_of(results)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: not whole results of eval.py ({problem!r:.80})") from None
    return results


def compare(files):
    """Several models side by side: python eval.py compare A.json B.json ... (or the folders they lie in)

    The best of each line is marked where the lines may be compared at all; below stands what may not.
    """
    if len(files) < 2:
        raise UserError("compare needs two results or more: python eval.py compare A.json B.json")
    all_results = [read_results(file) for file in files]
    rows = [["", *map(str, files)]]
    rows.append(["model", *(str(results["model"].get("name")) for results in all_results)])
    rows.append(
        ["parameters", *(f"{results['model']['non_embedding']:,}" for results in all_results)]
    )
    rows.append(["context, stride", *map(context_of, all_results)])
    paths = dict.fromkeys(path for results in all_results for path in results.get("tasks", {}))
    metrics = [
        *METRICS,
        *(
            Metric(f"{Path(path).name} accuracy", ("tasks", path, "accuracy"), ".1%")
            for path in paths
        ),
    ]
    unlike = {metric: what for metric in metrics if (what := difference(metric, all_results))}
    for metric in metrics:
        values = [metric.of(results) for results in all_results]
        known = [value for value in values if value is not None]
        top = (min if metric.lower_is_better else max)(known, default=None)
        marks = [
            " *" if v == top and len(known) > 1 and metric not in unlike else "" for v in values
        ]
        rows.append([metric.name, *(metric.shown(v) + mark for v, mark in zip(values, marks))])
    notes = [
        f"{metric.name}: not to be compared, the {what} differ" for metric, what in unlike.items()
    ]
    return "\n".join([aligned(rows), "", "* the best", *notes])


def context_of(results):
    found = [dig(results, "perplexity", key) for key in ("context", "stride")]
    return ", ".join(map(str, found)) if None not in found else ""


def difference(metric, all_results):
    """Returns in what the measurements of a metric differ, so that its numbers say nothing side by side."""
    measured = [results for results in all_results if metric.of(results) is not None]
    questions = {"numbers of questions": lambda results: dig(results, *metric.place[:-1], "n")}
    conditions = {
        "perplexity": {
            "texts": lambda results: dig(results, "perplexity", "text", "sha256"),
            "parts of the text": lambda results: dig(results, "perplexity", "text", "part"),
        },
        "boolq": questions,
        "tasks": questions,
        "smoke": {
            "prompts": lambda results: [
                dig(row, "prompt") for row in results["smoke"]["responses"]
            ],
            "lengths of the responses": lambda results: dig(
                results, "smoke", "settings", "max_new_tokens"
            ),
        },
    }[metric.place[0]]
    if metric.place[1] == "token_perplexity":
        conditions["tokenizers"] = lambda results: dig(results, "model", "tokenizer_sha256")
    for what, condition in conditions.items():
        if any(condition(results) != condition(measured[0]) for results in measured):
            return what
    return ""


# ----------------------------------------------------------------------------------------------
# Against what is expected of its size


def assess(files, expected):
    """One model against what is expected of its size: python eval.py assess results.json (or its folder)

    Ranges are those of configs/eval/expected.json, or of --expected=FILE, each with its source. Exits with 1
    if the results cannot be read.
    """
    if len(files) != 1:
        raise UserError("assess needs one file of results: python eval.py assess results.json")
    results, sizes = read_results(files[0]), read_expected(expected)
    count = results["model"]["non_embedding"]
    size = size_class(count, sizes)
    rows = [["metric", "value", "expected", "verdict", "source"]]
    for entry in sizes[size]["ranges"]:
        rows += [
            judged(metric, results, entry) for metric in METRICS if ".".join(metric.place) in entry
        ]
    known = ", ".join(f"{name} {entry['non_embedding']:,}" for name, entry in sizes.items())
    about = f"{files[0]}: size class {size}: {count:,} parameters without embeddings, nearest of {known}"
    found = aligned(rows) if len(rows) > 1 else f"no ranges are known for {size}"
    todo = [f"- {sentence}" for sentence in advice(results, rows[1:])]
    return "\n".join(
        [
            about,
            "",
            found,
            "",
            headline(results),
            "",
            "what to do",
            *(todo or ["- nothing stands out"]),
        ]
    )


def read_expected(path):
    """Returns {size: {"non_embedding", "ranges"}} of a file such as configs/eval/expected.json."""
    sizes = read_object(str(path)).get("sizes")
    if not isinstance(sizes, dict) or not sizes:
        raise UserError(f"{path}: must hold sizes, {{name: {{non_embedding, ranges}}}}")
    for name, entry in sizes.items():
        count, ranges = dig(entry, "non_embedding"), dig(entry, "ranges")
        if type(count) is not int or count < 1 or not isinstance(ranges, list):
            raise UserError(
                f"{path}: size {name!r} must hold non_embedding, a count, and ranges, a list"
            )
        for number, found in enumerate(ranges, start=1):
            for metric in METRICS:
                pair = dig(found, ".".join(metric.place)) or [0, 0]
                if not isinstance(pair, list) or [type(x) in (int, float) for x in pair] != [
                    True,
                    True,
                ]:
                    raise UserError(
                        f"{path}: {name} range {number}: {metric.name} must be [low, high]"
                    )
    return sizes


def size_class(count, sizes):
    """Returns the size whose parameters without embeddings are nearest to `count`, by ratio."""
    return min(sizes, key=lambda name: abs(math.log(count / sizes[name]["non_embedding"])))


def judged(metric, results, entry):
    """Returns a row: the metric, its value, the range, a verdict in words, where the range is from."""
    low, high = entry[".".join(metric.place)]
    value, text = metric.of(results), dig(results, "perplexity", "text", "name") or "another text"
    if value is None:
        word = "not measured"
    elif metric.place[0] == "perplexity" and not text.startswith(entry.get("text", "")):
        word = f"not comparable: measured on {text}"
    elif low <= value <= high:
        word = "within"
    else:
        word = "better" if (value < low) == metric.lower_is_better else "worse"
    expected = f"{metric.shown(low)} to {metric.shown(high)}"
    return [metric.name, metric.shown(value), expected, word, str(entry.get("source", "not named"))]


STRANGE = "is this the tokenizer it was trained with?"
OVERWRITTEN = "fine-tuning overwrote the rest; a smaller --learning_rate, fewer epochs or --lora_r=16 keep more"
PARTS = {  # of smoke.py's scores: what helps where one is low
    "order": "words stand in no English order: train longer, or on more text",
    "english": "few English function words: look at what the model was trained on",
    "repetition": "it goes round in circles: train longer; sample with --repetition_penalty=1.1",
    "length": "responses are too short: look at the answers in the fine-tuning data",
    "completeness": "responses break off: fine-tune on answers that end, or raise --max_new_tokens",
    "relevance": "responses are off the point: fine-tune a base model (sft.py), a tuned one with more data",
    "answer": "checkable answers are wrong: more and more varied examples of such tasks in sft.py",
}


def advice(results, rows):
    """Yields what to do about what failed; `rows` are `judged`'s."""
    text, boolq, responses = (
        results["perplexity"],
        results["boolq"],
        results["smoke"].get("responses") or [],
    )
    for name, part in (("perplexity", text), ("BoolQ", boolq)):
        if part.get("verdict") == "not measured":
            yield f"{name} was not measured: {part.get('reason')}"
    tuned = results["model"].get("template")
    bits, unigram = METRICS[0].of(results), dig(text, "baselines", "unigram", "bits_per_byte")
    if bits is not None and unigram is not None and bits >= unigram:
        yield f"token frequencies alone predict the text as well: {OVERWRITTEN if tuned else STRANGE}"
    elif any(
        row[0].endswith("per byte") or row[0].endswith("perplexity")
        for row in rows
        if row[3] == "worse"
    ):
        yield "perplexity: train longer while the validation loss falls, then on more text, or nearer text"
    if "not distinguishable" in str(boolq.get("verdict")) or "worse" in str(boolq.get("verdict")):
        yield "BoolQ: nothing here says that it reads the passage; do not report the accuracy as a skill"
    means = {name: part_mean(responses, name) for name in PARTS}
    means = {name: value for name, value in means.items() if value is not None and value < 0.5}
    if means:
        name = min(means, key=means.get)
        yield f"smoke prompts: lowest is {name} ({means[name]:.2f}): {PARTS[name]}"
    ends = METRICS[6].of(results)
    if ends is not None and ends < 0.5:
        yield f"only {ends:.0%} of the responses end by themselves: sft.py teaches that"


def part_mean(responses, name):
    values = [dig(row, "parts", name) for row in responses]
    values = [value for value in values if isinstance(value, (int, float))]
    return sum(values) / len(values) if values else None
