"""Which documents repeat an earlier one: exactly (SHA-256), or nearly (MinHash and LSH).

`sha256` and `minhash` are pure functions of texts and run in worker processes, a batch at a time.
`Index` then decides in the order of the input, in bounded memory and two files, and keeps the first
document of a cluster. From the two files it resumes with the decisions of an unbroken run.

Two documents are near duplicates if the share of equal places of their signatures, an estimate of
their Jaccard similarity, reaches the threshold. Equal bands only propose candidates to compare.
"""

import functools
import hashlib
import math
import re
from collections import defaultdict
from itertools import chain

import numpy as np

from corpus.clean import UNSPACED

PERMUTATIONS = 128  # the estimate of a Jaccard similarity of 0.8 is off by 0.035 (one sigma)
NGRAM = 5  # words of a shingle
EMPTY = 0xFFFFFFFF  # in every place of the signature of a document without words
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BASE = 0xD1342543DE82EF95  # odd: it has an inverse modulo 2**64
HIGH, LOW = np.uint64(0xFFFFFFFF << 32), np.uint64(0xFFFFFFFF)


# ---- fingerprints


def sha256(texts):
    """Returns the first 8 bytes of each text's SHA-256: (N,) uint64."""
    hashes = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts)
    return np.frombuffer(b"".join(hashes), np.uint64)


def minhash(texts, seed):
    """Returns the MinHash of each text's shingles (Broder 1997): (N, PERMUTATIONS) uint32.

    The values are those of datasketch (2.0, scheme affine32), bit for bit, vectorised over texts. A
    text without words has EMPTY in every place, as an empty datasketch.MinHash has.
    """
    signatures = np.full((len(texts), PERMUTATIONS), EMPTY, np.uint32)
    grams, counts = shingles([text.lower() for text in texts])
    worded = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[worded]
    grams ^= grams >> np.uint32(16)  # the finalizer of MurmurHash3, as datasketch has it
    grams *= np.uint32(0x85EBCA6B)
    grams ^= grams >> np.uint32(13)
    grams *= np.uint32(0xC2B2AE35)
    grams ^= grams >> np.uint32(16)
    permuted, minima = np.empty_like(grams), np.empty((PERMUTATIONS, len(worded)), np.uint32)
    for a, b, row in zip(*permutations(seed), minima, strict=True):
        np.multiply(grams, a, out=permuted)
        np.add(permuted, b, out=permuted)
        np.minimum.reduceat(permuted, starts, out=row)
    signatures[worded] = minima.T
    return signatures


@functools.cache
def permutations(seed):
    """Returns the factors, which are odd, and the summands: two rows of PERMUTATIONS uint32."""
    random = np.random.RandomState(seed % 2**32)  # drawn as datasketch draws them
    factors = 2 * random.randint(0, 2**31, PERMUTATIONS, np.uint32) + 1
    return factors, random.randint(0, 2**32, PERMUTATIONS, np.uint32)


def shingles(texts):
    r"""Returns (grams, counts): 32-bit hashes of the word 5-grams, and how many each text has.

    A word is what `\w+` finds; in scripts without spaces, each of its characters. A text of fewer
    than 5 words has one shingle, the whole. Repeated shingles stay: a minimum does not mind. The
    time is linear in the length of the texts.
    """
    words, counts = hash_words(texts)
    gap = NGRAM - 1  # so many zeros follow each text: a short text gives a shingle too
    shifts = gap * np.arange(len(texts))
    spaced = np.zeros(len(words) + gap * (len(texts) + 1), np.uint64)
    spaced[np.arange(len(words)) + np.repeat(shifts, counts)] = words
    grams = np.zeros(len(spaced) - gap, np.uint64)
    for offset in range(NGRAM):
        grams = mix(grams, spaced[offset : offset + len(grams)])
    firsts = np.cumsum(counts) - counts + shifts
    counts = np.where(counts > gap, counts - gap, counts > 0)
    places = np.arange(counts.sum()) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
    return (grams[places] >> np.uint64(32)).astype(np.uint32), counts


def mix(hashes, values):
    """Enters values into 64-bit hashes: a polynomial modulo 2**64, shifted at each step."""
    hashes = hashes + values
    hashes *= GOLDEN
    hashes ^= hashes >> np.uint64(29)
    return hashes


def hash_words(texts):
    """Returns (hashes, counts): 64-bit hashes of all words, and how many words each text has.

    The hash of a word is a polynomial in its characters: a sum of characters times powers of BASE,
    counted from the first text, divided by the power at which the word begins.
    """
    joined = "\n" + "\n".join(texts) + "\n"
    characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = character_kinds().take(characters)
    alone = np.flatnonzero(kinds == 2)
    kinds[alone] += (alone & 1).astype(np.uint8)  # neighbours differ: each is a word
    edges = np.flatnonzero(kinds[1:] != kinds[:-1])  # the last character before each
    starts, ends = edges[::2], edges[1::2]
    if len(alone):  # a word may follow a word
        words = np.flatnonzero(kinds[1:][edges])
        starts, ends = edges[words], edges[words + 1]
    up, down, sums = powers(1 << len(characters).bit_length())[:, : len(characters)]
    np.multiply(characters, up, out=sums)  # into old memory: new pages take four times as long
    np.cumsum(sums, out=sums)
    hashes = (sums[ends] - sums[starts]) * down[1:][starts]
    borders = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return hashes, np.diff(np.searchsorted(starts, borders))


@functools.cache
def character_kinds():
    r"""Returns for every code point 1 if `\w` matches it, 2 if it also is UNSPACED, else 0."""
    kinds = np.zeros(0x110000, np.uint8)
    everything = "".join(map(chr, range(0x40000)))  # no plane beyond has letters
    for kind, pattern in enumerate((r"\w+", rf"(?:(?=\w)[{UNSPACED}])+"), start=1):
        for run in re.finditer(pattern, everything):
            kinds[run.start() : run.end()] = kind
    return kinds


@functools.lru_cache(2)  # a longer one than usual is soon forgotten
def powers(size):
    """Returns the first `size` powers of BASE and of its inverse modulo 2**64, and a row to use."""
    table = np.ones((3, size), np.uint64)
    table.T[1:] = np.array([BASE, pow(BASE, -1, 2**64), 1], np.uint64)
    return np.multiply.accumulate(table, axis=1)


# ---- bands


def band_shape(threshold):
    """Returns (bands, rows): how many bands of how many places propose candidates at a threshold.

    At most 2% of the pairs exactly as similar as the threshold are missed, fewer of more similar
    ones (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). Of such shapes it is the
    cheapest: bands cost memory, candidates that share but a tenth of their shingles cost time.
    """
    costs = {}
    for rows in range(1, PERMUTATIONS // 2 + 1):
        chance = min(max(threshold**rows, 1e-9), 1 - 1e-9)  # that a band of such a pair is equal
        bands = max(2, math.ceil(math.log(0.02) / math.log1p(-chance)))
        if bands * rows <= PERMUTATIONS:
            costs[bands, rows] = bands + 2_000 * (1 - (1 - 0.1**rows) ** bands)
    return min(costs, key=costs.get, default=(PERMUTATIONS, 1))


def band_keys(signatures, shape):
    """Returns a hash of each band of each signature in the high halves of (N, bands) uint64."""
    bands, rows = shape
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), (len(signatures), bands))
    for row in range(rows):
        keys = mix(keys, signatures[:, row : bands * rows : rows])
    return keys & HIGH


# ---- the index


class SortedRuns:
    """A growing set of 64-bit numbers: sorted arrays, each at least twice as long as the next.

    It takes 8 bytes a number; while two arrays merge, both exist twice.
    """

    def __init__(self, numbers=()):
        self.runs = [np.sort(numbers)] if len(numbers) else []

    def add(self, numbers):
        self.runs += [np.sort(numbers)] if len(numbers) else []
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            merged = np.concatenate(self.runs[-2:])
            del self.runs[-2:]
            merged.sort(kind="stable")  # finds the two runs and merges them
            self.runs.append(merged)

    def between(self, lows, highs):
        """Yields (i, numbers) for every array that has numbers from lows[i] to highs[i]."""
        for run in self.runs:
            left = run.searchsorted(lows)
            hits = np.flatnonzero(run[np.minimum(left, len(run) - 1)] <= highs)
            hits = hits[left[hits] < len(run)]
            right = run.searchsorted(highs[hits], "right")
            for i, begin, end in zip(hits.tolist(), left[hits], right, strict=True):
                yield i, run[begin:end]


class Index:
    """Judges documents in their order, in bounded memory and two files.

    In memory: 8 bytes for each distinct document, and 8 for each band of each document kept (half
    of them hash, half its number). A digest has 64 bits: among n documents one is lost by chance
    with a probability of n**2 / 2**65, 2e-6 for 8 million. On the disk: the digests, and the
    signatures of the documents kept, of which only candidates are read. These have 16 bits a place
    (b-bit minwise hashing, Li and Konig 2010): a place then agrees by chance once in 65,536.

    The files are open to append to; they hold the documents judged before. threshold None: exact
    duplicates only.
    """

    def __init__(self, digest_file, signature_file, threshold=None):
        self.threshold, self.shape = threshold, band_shape(threshold or 1)
        self.digest_file, self.signature_file = digest_file, signature_file
        self.count = signature_file.tell() // (2 * PERMUTATIONS)
        self.distinct = SortedRuns(np.fromfile(digest_file.name, np.uint64))
        self.bands = [SortedRuns() for _ in range(self.shape[0])]
        for start in range(0, self.count, 1 << 16):
            numbers = np.arange(start, min(start + (1 << 16), self.count), dtype=np.uint64)
            self._add_bands(band_keys(self._stored(numbers), self.shape), numbers)

    def _stored(self, numbers):
        """Returns signatures from the file."""
        shape = (self.count, PERMUTATIONS)
        return np.array(np.memmap(self.signature_file.name, np.uint16, "r", shape=shape)[numbers])

    def _add_bands(self, keys, numbers):
        for column, runs in zip(keys.T, self.bands, strict=True):
            runs.add(column | numbers)

    def judge(self, digests, signatures=None):
        """Returns for each document "exact-duplicate", "near-duplicate", or None if it is kept.

        Takes what `sha256` and `minhash` return for a batch of some hundred documents, in input
        order. How the input is cut into batches makes no difference.
        """
        exact = np.ones(len(digests), bool)
        exact[np.unique(digests, return_index=True)[1]] = False  # the first of the batch
        exact[[i for i, _ in self.distinct.between(digests, digests)]] = True
        near = self._near(signatures.astype(np.uint16), ~exact) if self.threshold else False
        self.distinct.add(digests[~exact])
        self.digest_file.write(digests[~exact].tobytes())
        reasons = np.where(exact, "exact-duplicate", np.where(near, "near-duplicate", None))
        return reasons.tolist()

    def _near(self, signatures, kept):
        """Returns which documents of those to keep are near duplicates; adds the others."""
        kept &= (signatures != EMPTY & 0xFFFF).any(axis=1)  # a text without words is unique
        keys, candidates = band_keys(signatures, self.shape), defaultdict(list)
        share_band = np.zeros((len(kept), len(kept)), bool)  # within the batch
        for column, runs in zip(keys.T, self.bands, strict=True):
            share_band |= column[:, None] == column
            for i, entries in runs.between(column, column | LOW):
                candidates[i].append(entries & LOW)
        share_band = np.tril(share_band, -1)  # with earlier documents
        near = np.zeros(len(kept), bool)
        for i in sorted(candidates.keys() | np.flatnonzero(share_band.any(axis=1)).tolist()):
            if not kept[i]:
                continue
            places = np.unique(np.concatenate([*candidates[i], np.zeros(0, np.uint64)]))
            blocks = (places[at : at + 4096] for at in range(0, len(places), 4096))  # may be many
            rows = chain([signatures[share_band[i] & kept]], map(self._stored, blocks))
            agree = (np.count_nonzero(row == signatures[i], axis=1) for row in rows)
            near[i] = any((counts >= self.threshold * PERMUTATIONS).any() for counts in agree)
            kept[i] = not near[i]
        numbers = np.arange(self.count, self.count + kept.sum(), dtype=np.uint64)
        self._add_bands(keys[kept], numbers)
        self.signature_file.write(signatures[kept].tobytes())
        self.signature_file.flush()  # _stored reads it
        self.count += len(numbers)
        return near

    @property
    def nbytes(self):
        return sum(run.nbytes for runs in (self.distinct, *self.bands) for run in runs.runs)
