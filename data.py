"""Prepared tokens and rows -> batches; and the command for all data work.

    python data.py configs/datasets/docstrings.json   prepare a dataset from raw text
    python data.py inspect PATH                       show what a file or a dataset holds
    python data.py retokenize FOLDER                  encode a dataset with another tokenizer
    python data.py create_sample_datasets             write small files for SFT and DPO

Each command has its own --help.

A batch is a pure function of (seed, step, micro-step, rank): a killed run has no position to lose.
Arrays are numpy: B rows of T positions.
"""

import bisect
import math
import sys
from functools import lru_cache

import numpy as np

from lib.config import UserError, dispatch
from lib.folders import open_all
from lib.tokenizer import IGNORE

MIXTURE_PERIOD = 1024  # rows after which the proportions of a mixture are exact

# ----------------------------------------------------------------------------------------------
# Streams: endless shuffled batches, addressed by number


class BatchStream:
    """Endless passes over `blocks` rows, each pass in another order.

    A subclass sets `blocks` and says which block stands at a row of the endless stream, `block_at`,
    and what the batch of some is, `gather`: arrays, and "count", the number of supervised terms.
    """

    period = 0  # a batch does not depend on the weights, see `train.fit`

    def __init__(self, batch_size, seed=0, world_size=1):
        self.batch_size, self.seed, self.world_size = batch_size, seed, world_size

    def batch(self, step, micro=0, rank=0, accumulation=1):
        """Returns the micro-batch of one rank: batch_size rows of the endless stream.

        The rows of a step depend on its global batch, not on how many ranks and micro-steps do it.
        """
        first = ((step * accumulation + micro) * self.world_size + rank) * self.batch_size
        return self.gather([self.block_at(row) for row in range(first, first + self.batch_size)])

    def rows(self, start, stop):
        """Returns the batch of blocks start..stop in their own order: what validation scores."""
        return self.gather(range(start, min(stop, self.blocks)))


def permutation(size, seed, *words):
    """Returns the numbers 0..size in an order that is a function of (seed, words) alone.

    NumPy's policy freezes RandomState: later releases must give the same order, or a resumed run
    would see other rows.
    """
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, *words]
    return np.random.RandomState(words).permutation(size)


class TokenStream(BatchStream):
    """The tokens of one split of prepared datasets, cut into blocks of T inputs and T labels.

    Block i of a dataset holds tokens [i T, i T + T) as "ids" and those one further as "labels".
    The last block is padded (label IGNORE): a pass supervises every token but the first once.

    Several paths without `weights` count as one long dataset. With `weights` each row comes from
    one of them, in exactly these proportions over any aligned MIXTURE_PERIOD rows.

    document_mask=True adds "documents" (B, T) int32, a number that grows at each BOS, and
    "positions" (B, T) int64, which restart there. The label BOS is then unsupervised: the model
    may not look back over the border, and could not know that the document ends.
    """

    def __init__(
        self, paths, split, sequence_length, batch_size, seed=0, world_size=1,
        weights=None, document_mask=False,
    ):  # fmt: skip
        super().__init__(batch_size, seed, world_size)
        self.sources = open_all(paths, split)
        self.sequence_length, self.document_mask = sequence_length, document_mask
        for source in self.sources:
            if split == "train" and source.tokens <= sequence_length:
                sizes = f"only {source.tokens} tokens, need at least {sequence_length + 1}"
                raise UserError(f"{source.folder}: {sizes}; shorten sequence_length, or add text")
        first = self.sources[0]
        self.vocab_size, self.tokenizer_sha256 = first.vocab_size, first.tokenizer_sha256
        self.pad_id, self.bos_id = first.manifest["pad_id"], first.manifest["bos_id"]
        self.tokenizer = first.folder / "tokenizer.model"
        self.tokens = sum(source.tokens for source in self.sources)
        # N tokens have N - 1 targets: 8 tokens at T 4 are two blocks, the second with 3 labels
        sizes = [-(-(source.tokens - 1) // sequence_length) for source in self.sources]
        self.block_ends = np.cumsum(sizes)
        self.blocks = int(self.block_ends[-1])
        # a lane is a range of blocks shuffled together: all of them, or one weighted dataset
        self.lanes, self.table = [(0, self.blocks)], np.zeros(1, np.int64)
        if weights is not None:
            self.lanes = [(int(end) - size, size) for end, size in zip(self.block_ends, sizes)]
            self.table = mixture_table(weights, [source.folder for source in self.sources], seed)
        # per period: the rows of each lane, and before row i those of the same lane
        self.shares = np.bincount(self.table, minlength=len(self.lanes))
        self.earlier = [int(np.sum(self.table[:i] == lane)) for i, lane in enumerate(self.table)]
        lane_order = lambda lane, epoch: permutation(self.lanes[lane][1], seed, lane, epoch)
        self.order = lru_cache(maxsize=2 * len(self.lanes))(lane_order)  # this pass, the next

    def block_at(self, row):
        period, slot = divmod(row, len(self.table))
        lane = int(self.table[slot])
        first, size = self.lanes[lane]
        epoch, at = divmod(period * int(self.shares[lane]) + self.earlier[slot], size)
        return first + int(self.order(lane, epoch)[at])

    def gather(self, blocks):
        T = self.sequence_length
        ids = np.full((len(blocks), T), self.pad_id, np.int64)
        labels = np.full((len(blocks), T), IGNORE, np.int64)
        for row, block in enumerate(blocks):
            number = int(np.searchsorted(self.block_ends, block, side="right"))
            source, before = self.sources[number], int(self.block_ends[number - 1]) if number else 0
            start = (block - before) * T
            tokens = source.read(start, min(start + T + 1, source.tokens))
            ids[row, : len(tokens)] = tokens[:T]
            labels[row, : len(tokens) - 1] = tokens[1:]
        batch = {"ids": ids, "labels": labels}
        if self.document_mask:
            opens, index = ids == self.bos_id, np.arange(T)
            batch["documents"] = np.cumsum(opens, axis=1, dtype=np.int32)
            batch["positions"] = index - np.maximum.accumulate(np.where(opens, index, 0), axis=1)
            labels[labels == self.bos_id] = IGNORE
        return batch | {"count": int(np.count_nonzero(labels != IGNORE))}


def mixture_table(weights, names, seed):
    """Returns which dataset each row of a period takes, (MIXTURE_PERIOD,), in a seeded order.

    Each dataset gets its exact share rounded down; the rows left over go to the largest remainders.
    """
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} weights for {len(names)} datasets; give each its weight")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"data_weights {weights}: each must be a finite number > 0")
    exact = np.asarray(weights, float) / np.sum(weights) * MIXTURE_PERIOD
    counts = exact.astype(np.int64)
    missing = MIXTURE_PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if not counts.all():
        small = f"its weight is below 1/{MIXTURE_PERIOD} of the mixture"
        raise UserError(f"{names[int(counts.argmin())]}: {small}; raise it, or leave it out")
    table = np.repeat(np.arange(len(names)), counts)
    return np.random.RandomState(seed & 0xFFFFFFFF).permutation(table)


class ExampleStream(BatchStream):
    """A list of examples as a stream; `collate` makes the batch of some of them."""

    def __init__(self, examples, collate, batch_size, seed=0, world_size=1):
        super().__init__(batch_size, seed, world_size)
        self.examples, self.collate, self.blocks = examples, collate, len(examples)
        epoch_order = lambda epoch: permutation(self.blocks, seed, epoch)
        self.order = lru_cache(maxsize=2)(epoch_order)  # this pass and the next

    def block_at(self, row):
        epoch, at = divmod(row, self.blocks)
        return int(self.order(epoch)[at])

    def gather(self, blocks):
        return self.collate([self.examples[block] for block in blocks])


# ----------------------------------------------------------------------------------------------
# Examples, (ids, mask) with mask 1 on an id that is to be predicted -> rows of one batch


def supervised_rows(rows, length, pad_id, packed=False):
    """Returns examples as arrays of static shape: the batch that `model.next_token_loss` takes.

    `rows` are lists of (ids, mask): the examples that share a row of `length` positions. With
    `packed` "documents" and "positions" (B, T) tell them apart; else there is one example in each
    row. T is only what the longest row needs, in powers of two, so that there are few shapes.

    "ids" are (B, T); "where" (N,) are the places of the supervised positions in the flattened
    rows, and "labels" (N,) the ids that follow them, padded with IGNORE. "tokens" counts inputs.
    """
    used = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    T = min(length, max(32, 1 << (used - 1).bit_length()))
    ids, labels = (np.full((len(rows), T), fill, np.int64) for fill in (pad_id, IGNORE))
    documents, positions = (np.zeros((len(rows), T), kind) for kind in (np.int32, np.int64))
    for row, examples in enumerate(rows):
        start = 0
        for number, (example, mask) in enumerate(examples, start=1):
            # the last id is only predicted, the first only read
            span = slice(start, start + len(example) - 1)
            ids[row, span] = example[:-1]
            labels[row, span] = np.where(mask[1:], example[1:], IGNORE)
            documents[row, span], positions[row, span] = number, np.arange(len(example) - 1)
            start = span.stop
    where = np.flatnonzero(labels != IGNORE)
    rest = (0, -len(where) % 64 if len(where) else 64)  # few shapes again
    batch = {"ids": ids, "where": np.pad(where, rest)}
    batch["labels"] = np.pad(labels.flat[where], rest, constant_values=IGNORE)
    if packed:
        batch |= {"documents": documents, "positions": positions}
    return batch | {"count": len(where), "tokens": int(np.count_nonzero(documents))}


def pack_examples(examples, length):
    """Returns [[example, ...], ...]: (ids, mask) examples in few rows of `length` positions.

    Best-fit decreasing: the longest first, each into the fullest row that still has room for it.
    """
    rows, free = [], []  # free: (positions left, row), sorted
    for example in sorted(examples, key=lambda example: -len(example[0])):
        size = len(example[0]) - 1
        at = bisect.bisect_left(free, (size, -1))
        left, row = free.pop(at) if at < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(free, (left - size, row))
    return rows


# ----------------------------------------------------------------------------------------------
# The command


def main(argv):
    """Runs the command that the first word names; without one it prepares a dataset."""
    from corpus import inspect, prepare, samples

    commands = {
        "inspect": (inspect.inspect, inspect.InspectConfig),
        "retokenize": (prepare.retokenize, prepare.RetokenizeConfig),
        "create_sample_datasets": (samples.create_sample_datasets, samples.SampleFilesConfig),
    }
    dispatch(commands, argv, __doc__, default=(prepare.main, prepare.DataConfig))


if __name__ == "__main__":
    main(sys.argv[1:])
