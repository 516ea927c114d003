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
    for factor, shift in (0x85EBCA6B, 13), (0xC2B2AE35, 16):
        grams *= np.uint32(factor)
        grams ^= grams >> np.uint32(shift)
    random = np.random.RandomState(seed % 2**32)  # draws as datasketch does
    factors = 2 * random.randint(0, 2**31, PERMUTATIONS, np.uint32) + 1  # odd
    summands = random.randint(0, 2**32, PERMUTATIONS, np.uint32)
    permuted, minima = np.empty_like(grams), np.empty((PERMUTATIONS, len(worded)), np.uint32)
    for a, b, row in zip(factors, summands, minima, strict=True):
        np.multiply(grams, a, out=permuted)
        np.add(permuted, b, out=permuted)
        np.minimum.reduceat(permuted, starts, out=row)
    signatures[worded] = minima.T
    return signatures


def shingles(texts):
    r"""Returns (grams, counts): 32-bit hashes of the word 5-grams, and how many each text has.

    A word is what `\w+` finds; in scripts without spaces, each of its characters. A text of fewer
    than 5 words has one shingle, the whole. Repeated shingles stay: a minimum does not mind. The
    time is linear in the length of the texts.
    """
    gap = NGRAM - 1  # so many empty words follow each text: a short text gives a shingle too
    words, starts = hash_words("".join(text.replace("\0", " ") + "\0" * gap for text in texts))
    grams = np.zeros(len(words[gap:]), np.uint64)
    for offset in range(NGRAM):
        grams = mix(grams, words[offset : offset + len(grams)])
    firsts = starts.searchsorted(np.cumsum([0, *(len(text) + gap for text in texts)]))
    counts = np.diff(firsts) - gap
    counts = np.where(counts > gap, counts - gap, counts > 0)
    places = np.arange(counts.sum()) + np.repeat(firsts[:-1] - np.cumsum(counts) + counts, counts)
    return (grams[places] >> np.uint64(32)).astype(np.uint32), counts


def mix(hashes, values):
    """Enters values into 64-bit hashes: a polynomial modulo 2**64, shifted at each step."""
    hashes = hashes + values
    hashes *= GOLDEN
    hashes ^= hashes >> np.uint64(29)
    return hashes


def hash_words(text):
    r"""Returns (hashes, starts): the 64-bit hash of each word, and where it begins; \0 is one, 0.

    The hash of a word is a polynomial in its characters: a sum of characters times powers of BASE,
    counted from the text's beginning, divided by the power at which the word begins.
    """
    characters = np.frombuffer(f"\n{text}\n".encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = character_kinds().take(characters)
    left, right = kinds[:-1], kinds[1:]
    edge = (left != right) | (right == 2)
    starts, ends = np.flatnonzero(edge & (right > 0)), np.flatnonzero(edge & (left > 0))
    up, down, sums = powers(1 << len(characters).bit_length())[:, : len(characters)]
    np.cumsum(np.multiply(characters, up, out=sums), out=sums)  # old memory is faster than new
    return (sums[ends] - sums[starts]) * down[1:][starts], starts


@functools.cache
def character_kinds():
    r"""Returns for each code point 1 if `\w` matches it, 2 if it is a word alone, else 0."""
    kinds = np.zeros(0x110000, np.uint8)
    everything = "".join(map(chr, range(0x40000)))  # no plane beyond has letters
    for kind, pattern in enumerate((r"\w+", rf"(?:(?=\w)[{UNSPACED}])+|\0"), start=1):
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
    ones (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). Longer bands would be more
    in memory, shorter ones propose too many; low thresholds have none of four places.
    """
    for rows in (4, 3, 2, 1):
        chance = min(max(threshold**rows, 1e-9), 1 - 1e-9)  # that a band of such a pair is equal
        bands = max(2, math.ceil(math.log(0.02) / math.log1p(-chance)))
        if bands * rows <= PERMUTATIONS:
            return bands, rows
    return PERMUTATIONS, 1


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

    def __init__(self):
        self.runs = []

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
            hits = (left < len(run)) & (run.take(left, mode="clip") <= highs)
            for i in np.flatnonzero(hits).tolist():
                yield i, run[left[i] : run.searchsorted(highs[i], "right")]


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
        self.distinct = SortedRuns()
        self.distinct.add(np.fromfile(digest_file.name, np.uint64))
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
        near, proposed = np.zeros(len(kept), bool), share_band.any(axis=1)
        proposed[[*candidates]] = True
        for i in np.flatnonzero(proposed & kept):
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
