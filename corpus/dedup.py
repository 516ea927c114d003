"""Which documents repeat an earlier one: exactly (SHA-256), or nearly (MinHash over word 5-grams, LSH bands).

Two halves. `fingerprints` is a pure function of texts and runs in worker processes, a batch at a time. An
index then decides in the order of the input: `Index` for one preparing process, in bounded memory and files
of a work folder; `RedisIndex` where several processes, or machines, share one. Both keep the first document
of a cluster and judge alike, and resume after a kill with the decisions of an unbroken run.

A document is near an earlier one that was kept if their estimated Jaccard similarity, the share of equal
places of their signatures, reaches the threshold. Bands only propose whom to compare.
"""

import functools
import hashlib
import math
import os
import re
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lib.config import UserError

PERMUTATIONS = (
    128  # of a MinHash: the estimate of a Jaccard similarity of 0.8 is off by 0.035 (one sigma)
)
NGRAM = 5  # words of a shingle
GROUP = 1 << 18  # characters hashed at once: their arrays stay in a core's cache
CHUNK = 256  # documents compared with the index at once
EMPTY = 0xFFFFFFFF  # in every place of the signature of a document without words
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BASE = 0xD1342543DE82EF95  # odd: it has an inverse modulo 2**64
HIGH, LOW = np.uint64(0xFFFFFFFF << 32), np.uint64(0xFFFFFFFF)


# ---- fingerprints


def fingerprints(texts, seed):
    """Return (digests, signatures) of texts: (N, 16) uint8 and (N, PERMUTATIONS) uint32."""
    return sha256(texts), minhash(texts, seed)


def sha256(texts):
    """Return the first 16 bytes of each text's SHA-256: (N, 16) uint8."""
    hashes = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16] for text in texts)
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


def minhash(texts, seed):
    """Return the MinHash of each text's shingles (Broder 1997): (N, PERMUTATIONS) uint32.

    The values are datasketch's own (2.0, scheme affine32), bit for bit; a text without words has EMPTY in
    every place, as an empty datasketch.MinHash has.
    """
    signatures, done = np.full((len(texts), PERMUTATIONS), EMPTY, np.uint32), 0
    for group in groups(texts):
        grams, counts = shingles(group)
        some = np.flatnonzero(counts)
        if len(some):
            starts = (np.cumsum(counts) - counts)[some]
            signatures[done + some] = minima(grams, starts, permutations(seed))
        done += len(group)
    return signatures


def groups(texts):
    """Yield consecutive lists of lower-cased texts, of GROUP characters together or of one longer text."""
    group, size = [], 0
    for text in map(str.lower, texts):
        if group and size + len(text) >= GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text) + 1
    if group:
        yield group


@functools.cache
def permutations(seed):
    """Return datasketch's own factors and summands, as two rows of uint32."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=seed % 2**32, scheme="affine32").permutations


def minima(grams, starts, permutations):
    """Return, for all a and b, the least a * fmix(gram) + b modulo 2**32 of the grams from start to start.

    One permutation at a time goes over all documents: every step is one pass of whole vectors.
    """
    mixed = grams ^ (
        grams >> np.uint32(16)
    )  # MurmurHash3's finalizer, which datasketch applies first
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    permuted, result = (
        np.empty_like(mixed),
        np.empty((len(permutations[0]), len(starts)), np.uint32),
    )
    for a, b, row in zip(*permutations, result, strict=True):
        np.multiply(mixed, a, out=permuted)
        permuted += b
        np.minimum.reduceat(permuted, starts, out=row)
    return result.T


def shingles(texts):
    """Return (grams, counts): 32-bit hashes of the word 5-grams of lower-cased texts, and how many each has.

    A text with fewer words has one shingle, the whole; words are what `\\w+` finds. Repeated shingles stay:
    a minimum does not mind. The time is linear in the length of the texts, whatever they hold.
    """
    words, counts = hash_words(texts)
    gap = NGRAM - 1  # nothing, that many times, after each text: a short text is a shingle, too
    spaces = gap * np.arange(len(texts))
    spaced = np.zeros(len(words) + gap * (len(texts) + 1), np.uint64)
    spaced[np.arange(len(words)) + np.repeat(spaces, counts)] = words
    grams = np.zeros(len(spaced) - gap, np.uint64)
    for offset in range(NGRAM):
        grams = mix(grams, spaced[offset : offset + len(grams)])
    firsts = np.cumsum(counts) - counts + spaces
    counts = np.where(counts > gap, counts - gap, counts > 0)
    places = np.arange(counts.sum()) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
    return (grams[places] >> np.uint64(32)).astype(np.uint32), counts


def mix(hashes, values):
    """Enter values into 64-bit hashes, in order: a polynomial modulo 2**64 with shifts between its steps."""
    hashes = (hashes + values) * GOLDEN
    hashes ^= hashes >> np.uint64(29)
    return hashes


def hash_words(texts):
    """Return (hashes, counts): 64-bit hashes of the words of all texts, and how many words each text has.

    A word's hash is a polynomial in its characters: the difference of two prefix sums over all the text,
    divided by the power of BASE with which the word begins.
    """
    joined = "\n" + "\n".join(texts) + "\n"
    characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = word_characters().take(characters)
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    size = len(characters)
    up, down = powers(GROUP + 2) if size <= GROUP + 2 else powers.__wrapped__(size)
    sums = np.zeros(size + 1, np.uint64)
    np.cumsum(characters * up[:size], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * down[starts]
    borders = np.cumsum([1, *(len(text) + 1 for text in texts)])
    return hashes, np.diff(np.searchsorted(starts, borders))


@functools.cache
def word_characters():
    """Return, for every code point, whether `\\w` matches it."""
    return np.array([chr(code).isalnum() or code == ord("_") for code in range(0x110000)])


@functools.cache
def powers(size):
    """Return the first `size` powers of BASE and of its inverse modulo 2**64, as two rows."""
    table = np.empty((2, size), np.uint64)
    table.T[:] = np.array([BASE, pow(BASE, -1, 2**64)], np.uint64)
    table[:, 0] = 1
    return np.multiply.accumulate(table, axis=1)


# ---- what both indexes share


def band_shape(threshold):
    """Return (bands, rows): how many bands of how many places propose the candidates at a threshold.

    Of the pairs exactly as similar as the threshold 2% at most are missed, of more similar ones fewer
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). Among such shapes a band costs memory, and
    candidates that share but a tenth of their shingles cost time.
    """

    def bands(rows):
        chance = max(
            threshold**rows, 1e-9
        )  # that one band of such a pair is equal; 0 has no logarithm
        return 2 if chance == 1 else max(2, math.ceil(math.log(0.02) / math.log1p(-chance)))

    def cost(shape):
        return shape[0] + 2_000 * (1 - (1 - 0.1 ** shape[1]) ** shape[0])

    shapes = [(bands(rows), rows) for rows in range(1, PERMUTATIONS // 2 + 1)]
    return min(
        (s for s in shapes if s[0] * s[1] <= PERMUTATIONS), key=cost, default=(PERMUTATIONS, 1)
    )


def band_keys(signatures, shape):
    """Return a hash of each band of each signature in the high halves of (N, bands) uint64."""
    bands, rows = shape
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), (len(signatures), bands))
    for row in range(rows):
        keys = mix(keys, signatures[:, row : bands * rows : rows])
    return keys & HIGH


def lowered(digests, signatures):
    """Return signatures with 16 bits a place (b-bit minwise hashing, Li and Konig 2010).

    A place then agrees by chance once in 65,536, so the share of equal places needs no correction. Where
    there are no signatures every document counts as one without words.
    """
    if signatures is None:
        return np.full((len(digests), PERMUTATIONS), EMPTY & 0xFFFF, np.uint16)
    return signatures.astype(np.uint16)


def has_words(signatures):
    return (signatures != EMPTY & 0xFFFF).any(axis=1)


def compared(signatures, reasons):
    """Return which documents later ones are to be compared with: those kept, if they have words."""
    return has_words(signatures) & np.array([reason is None for reason in reasons], bool)


def decide(names, signatures, keys, seen, candidates, fetch, threshold):
    """Return why each document of a chunk is dropped, or None if it is kept.

    seen: the places of documents that the index has; candidates: {place: whom it proposes}; fetch gives
    their signatures. The documents of the chunk that are kept are compared with those after them.
    """
    reasons, fresh, buckets = [], set(), defaultdict(list)
    for place, worded in enumerate(has_words(signatures)):
        bands = keys[place].tolist() if worded else []
        mates = sorted({mate for band in bands for mate in buckets.get(band, ())})
        alike = functools.partial(any_alike, signatures[place], threshold)
        if place in seen or names[place] in fresh:
            reasons.append("exact-duplicate")
        elif alike(candidates.get(place, ()), fetch) or alike(mates, signatures.__getitem__):
            reasons.append("near-duplicate")
        else:
            reasons.append(None)
            for band in bands:
                buckets[band].append(place)
        fresh.add(names[place])
    return reasons


def any_alike(signature, threshold, candidates, fetch):
    """Does one of the candidates agree with the signature in a share of at least `threshold` places?"""
    for start in range(
        0, len(candidates), 4096
    ):  # a boilerplate can propose a large part of the index
        rows = fetch(candidates[start : start + 4096])
        if (np.count_nonzero(rows == signature, axis=1) >= threshold * PERMUTATIONS).any():
            return True
    return False


def in_chunks(judge, digests, signatures):
    """Judge CHUNK documents at a time: that bounds the memory, and the result knows of no batch."""
    signatures = lowered(digests, signatures)
    parts = [slice(start, start + CHUNK) for start in range(0, len(digests), CHUNK)]
    return [reason for part in parts for reason in judge(digests[part], signatures[part])]


# ---- the index of one process


class Runs:
    """A growing set of 64-bit numbers: sorted arrays, each at least twice as long as the next.

    It takes 8 bytes a number; while two arrays merge, both exist twice.
    """

    def __init__(self, numbers=()):
        self.runs = []
        self.add(np.asarray(numbers, np.uint64))

    def add(self, numbers):
        self.runs += [np.sort(numbers)] if len(numbers) else []
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            merged = np.concatenate(self.runs[-2:])
            del self.runs[-2:]
            merged.sort(kind="stable")  # finds the two runs and merges them
            self.runs.append(merged)

    def between(self, lows, highs):
        """Yield (place, numbers) for every array that has numbers from lows[place] to highs[place]."""
        for run in self.runs:
            left = run.searchsorted(lows)
            hits = np.flatnonzero(run[np.minimum(left, len(run) - 1)] <= highs)
            hits = hits[left[hits] < len(run)]
            right = run.searchsorted(highs[hits], "right")
            for place, begin, end in zip(hits.tolist(), left[hits], right, strict=True):
                yield place, run[begin:end]

    @property
    def nbytes(self):
        return sum(run.nbytes for run in self.runs)


class Index:
    """Judges documents in their order, in bounded memory and two files of a folder.

    In memory: 8 bytes for each distinct document, and 8 for each band of each document kept (a hash of 32
    bits, its number in 32). Digests count with 64 bits: among n documents one is lost by chance with a
    probability of n**2 / 2**65, 2e-6 for 8 million. On the disk: the digests, and the signatures of the
    documents kept, 256 bytes each, of which only candidates are read.

    threshold None: exact duplicates only. state: what `checkpoint` returned, to go on from there.
    """

    def __init__(self, folder, threshold=None, state=None):
        state = state or {"documents": 0, "digests": 0, "signatures": 0}
        self.documents, self.signatures = state["documents"], state["signatures"]
        self.threshold, self.shape = threshold, band_shape(threshold or 1)
        self.digest_file = reopen(Path(folder) / "digests.bin", 8 * state["digests"])
        self.signature_file = reopen(
            Path(folder) / "signatures.bin", 2 * PERMUTATIONS * self.signatures
        )
        self.distinct = Runs(np.fromfile(self.digest_file.name, np.uint64))
        self.bands = [Runs(entries) for entries in self._entries()]

    def _entries(self):
        """Return what the bands hold, from the signatures on the disk."""
        entries = np.empty((self.shape[0], self.signatures), np.uint64)
        numbers = np.arange(self.signatures, dtype=np.uint64)
        for start in range(0, self.signatures, 1 << 16):
            part = slice(start, start + (1 << 16))
            entries[:, part] = (band_keys(self._stored(part), self.shape) | numbers[part, None]).T
        return entries

    def _stored(self, which):
        """Return signatures from the file by their numbers."""
        shape = (self.signatures, PERMUTATIONS)
        return np.array(np.memmap(self.signature_file.name, np.uint16, "r", shape=shape)[which])

    def judge(self, digests, signatures=None):
        """Return for each document "exact-duplicate", "near-duplicate", or None if it is kept.

        digests (N, 16) uint8 and signatures (N, PERMUTATIONS) uint32 of `fingerprints`, in input order; how
        the input is cut into calls makes no difference.
        """
        return in_chunks(self._judge, digests, signatures if self.threshold else None)

    def _judge(self, digests, signatures):
        names = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
        keys = band_keys(signatures, self.shape)
        seen = {place for place, _ in self.distinct.between(names, names)}
        candidates = self._candidates(keys)
        reasons = decide(
            names.tolist(), signatures, keys, seen, candidates, self._stored, self.threshold
        )
        self._insert_digests(names[[reason != "exact-duplicate" for reason in reasons]])
        kept = compared(signatures, reasons)
        self._insert_signatures(signatures[kept], keys[kept])
        self.documents += len(reasons)
        return reasons

    def _candidates(self, keys):
        """Return {place: numbers of the documents kept with which it has a band in common}."""
        found = defaultdict(list)
        for column, runs in zip(keys.T, self.bands, strict=True):
            for place, entries in runs.between(column, column | LOW):
                found[place].append(entries & LOW)
        return {place: np.unique(np.concatenate(numbers)) for place, numbers in found.items()}

    def _insert_digests(self, names):
        self.distinct.add(names)
        self.digest_file.write(names.tobytes())

    def _insert_signatures(self, signatures, keys):
        numbers = np.arange(self.signatures, self.signatures + len(signatures), dtype=np.uint64)
        for column, runs in zip(keys.T, self.bands, strict=True):
            runs.add(column | numbers)
        self.signature_file.write(signatures.tobytes())
        self.signature_file.flush()  # _stored reads it
        self.signatures += len(signatures)

    def checkpoint(self):
        """Bring both files to the disk and return what a later Index needs to go on from here."""
        for file in (self.digest_file, self.signature_file):
            file.flush()
            os.fsync(file.fileno())
        digests = self.distinct.nbytes // 8
        return {"documents": self.documents, "digests": digests, "signatures": self.signatures}

    @property
    def bytes_per_document(self):
        """Memory of the index by the documents judged."""
        return sum(runs.nbytes for runs in (self.distinct, *self.bands)) / max(1, self.documents)


def reopen(path, size):
    """Open a file to append to it, cut to its first `size` bytes; UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115
    if (found := file.tell()) < size:
        lost = f"{found:,} bytes, {size:,} were there at the last checkpoint"
        raise UserError(f"{path}: {lost}; delete {path.parent} to begin again")
    file.truncate(size)
    return file


# ---- the index of several processes


class RedisIndex:
    """Judges documents against an index on a Redis server, which any number of runs may share.

    The index is datasketch's MinHashLSH over its Redis storage, with the signatures (16 bits a place), the
    digests and every owner's verdicts beside it under names that begin with `namespace`. To judge a chunk and
    to insert it is one critical section, under a lock that expires should its holder die. Verdicts, digests
    and signatures are written last, in one transaction that fails if the lock was lost; a band's entry
    without a signature counts for nothing. So a run killed at any point leaves whole chunks or none, and when
    it comes again - same owner, same documents - it is told what it was told before.

    A document kept takes about 4 KB of the server's memory, nearly all of it datasketch's tables.

    UserError: no `redis` package, no server, another threshold or seed in this namespace, an owner's
    documents that are others than they were.
    """

    LOCK_SECONDS = 60  # far more than a chunk takes
    VERDICTS = (None, "exact-duplicate", "near-duplicate")
    bytes_per_document = 0  # of this process

    def __init__(self, url, namespace, owner, threshold, seed, state=None):
        try:
            import redis
        except ImportError:
            raise UserError(
                f"dedup_storage '{hidden(url)}': needs a package: pip install redis"
            ) from None
        self.redis, self.url, self.namespace, self.owner = redis, hidden(url), namespace, owner
        self.threshold, self.seed, self.verdicts = threshold, seed, self._name("verdicts", owner)
        self.documents = state["documents"] if state else 0
        try:
            retry = redis.retry.Retry(redis.backoff.NoBackoff(), 1)
            self.server = redis.Redis.from_url(
                url, socket_connect_timeout=10, socket_timeout=60, retry=retry
            )
        except ValueError as error:
            raise UserError(
                f"dedup_storage '{self.url}': {error}; expected redis://HOST:PORT/0"
            ) from None
        with self._reached():
            self._open()

    def _open(self):
        from datasketch import MinHashLSH

        storage = {"type": "redis", "basename": f"{self.namespace}:lsh".encode()}
        storage["redis"] = {"connection_pool": self.server.connection_pool}
        shape = band_shape(self.threshold or 1)
        self.lsh = MinHashLSH(
            num_perm=PERMUTATIONS, params=shape, storage_config=storage, prepickle=False
        )
        settings = f"threshold {self.threshold}, seed {self.seed}"
        self.server.setnx(self._name("settings"), settings)
        if (found := self.server.get(self._name("settings")).decode()) != settings:
            here = f"{self.url}: the index '{self.namespace}' has {found}, this run {settings}"
            raise UserError(f"{here}; set the same, or name another index")
        if (found := self.server.hlen(self.verdicts)) < self.documents:
            there = f"{self.documents:,} were there at the last checkpoint; prepare all of it again"
            has = f"the index '{self.namespace}' has {found:,} documents of '{self.owner}'"
            raise UserError(f"{self.url}: {has}, {there}")

    def _name(self, *words):
        return ":".join((self.namespace, *words))

    @contextmanager
    def _reached(self):
        try:
            yield
        except self.redis.RedisError as error:
            remedy = "start redis-server there and run again, or leave dedup_storage empty"
            raise UserError(
                f"{self.url}: no use of this Redis server ({error}); {remedy}"
            ) from None

    def judge(self, digests, signatures=None):
        """Return for each document "exact-duplicate", "near-duplicate", or None if it is kept.

        As Index.judge, except that what other runs have inserted in the meantime counts as earlier.
        """
        with self._reached():
            return in_chunks(self._judge, digests, signatures if self.threshold else None)

    def _judge(self, digests, signatures):
        names, stands = [digest.tobytes() for digest in digests], False
        while not stands:
            lock = self.server.lock(self._name("lock"), timeout=self.LOCK_SECONDS, sleep=0.005)
            lock.acquire()
            try:
                told = self._told_before(names)
                new = slice(len(told), None)
                reasons = self._judge_new(names[new], signatures[new])
                stands = self._commit(lock, names[new], signatures[new], reasons, len(told))
            finally:
                with suppress(
                    self.redis.exceptions.LockError
                ):  # it expired, and may be another's by now
                    lock.release()
        self.documents += len(names)
        return told + reasons

    def _told_before(self, names):
        """Return the verdicts on the first of these documents that an earlier, killed run was given."""
        told, numbers = [], range(self.documents, self.documents + len(names))
        for number, name, verdict in zip(
            numbers, names, self.server.hmget(self.verdicts, numbers), strict=True
        ):
            if verdict is None:
                break
            if verdict[:-1] != name:
                other = f"'{self.owner}' had another document {number} before"
                raise UserError(
                    f"{self.url}: the index '{self.namespace}': {other}; name another index"
                )
            told.append(self.VERDICTS[verdict[-1]])
        return told

    def _judge_new(self, names, signatures):
        if not names:
            return []
        seen = np.flatnonzero(self.server.smismember(self._name("exact"), names)).tolist()
        keys, candidates = (
            band_keys(signatures, (self.lsh.b, self.lsh.r)),
            self._candidates(signatures),
        )
        return decide(names, signatures, keys, set(seen), candidates, self._stored, self.threshold)

    def _candidates(self, signatures):
        """Return {place: names of the documents kept with which it has a band in common}."""
        found, wide = defaultdict(set), signatures.astype(np.uint32)  # as datasketch has them
        for (start, end), table in zip(self.lsh.hashranges, self.lsh.hashtables, strict=True):
            bands = [row.byteswap().tobytes() for row in wide[:, start:end]]
            for place, bucket in enumerate(table.getmany(*bands)):
                found[place] |= bucket
        return {place: sorted(bucket) for place, bucket in found.items()}

    def _stored(self, keys):
        """Return the signatures of documents, without those that were never committed."""
        values = self.server.hmget(self._name("signatures"), keys)
        return np.frombuffer(b"".join(filter(None, values)), np.uint16).reshape(-1, PERMUTATIONS)

    def _commit(self, lock, names, signatures, reasons, told):
        """Insert what was judged, all or nothing; False if the lock was lost meanwhile."""
        numbers = range(self.documents + told, self.documents + told + len(names))
        kept = np.flatnonzero(compared(signatures, reasons))
        stored = {f"{self.owner}:{numbers[place]}".encode(): signatures[place] for place in kept}
        self._insert_bands(stored)
        with self.server.pipeline() as pipe:
            pipe.watch(lock.name)
            if not lock.owned():
                return False
            pipe.multi()
            for number, name, reason in zip(numbers, names, reasons, strict=True):
                pipe.sadd(self._name("exact"), name)
                pipe.hset(self.verdicts, number, name + bytes([self.VERDICTS.index(reason)]))
            for key, signature in stored.items():
                pipe.hset(self._name("signatures"), key, signature.tobytes())
            try:
                pipe.execute()
            except self.redis.WatchError:
                return False
        return True

    def _insert_bands(self, stored):
        from datasketch import MinHash

        known = {"scheme": "affine32", "seed": self.seed, "permutations": permutations(self.seed)}
        with self.lsh.insertion_session() as session:
            for key, signature in stored.items():
                session.insert(key, MinHash(hashvalues=signature, **known), check_duplication=False)

    def checkpoint(self):
        """Return what a later RedisIndex needs to go on from here; the server keeps the rest."""
        return {"documents": self.documents}


def hidden(url):
    """A URL to show: without its password."""
    return re.sub(r"//.*@", "//***@", url)
