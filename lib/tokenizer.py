"""Text to ids and back: SentencePiece, and the Hugging Face tokenizer files.

The tokenizer is BPE with byte fallback and without normalization, so that every text survives the
round trip: `decode(encode(text)) == text` for all valid Unicode. Ids 0-3 are pad, bos, eos and
unk, 4 and 5 the chat markers; then come the 256 bytes, the merged pieces, and last single
characters. The six specials are control symbols: they have an id and no spelling. "<|im_end|>" in
a text is ten harmless characters; only `render` puts the id of a marker into a conversation.

No piece joins a line break to anything else, and a space stands only at the front of a piece: texts
that meet at a line break or before a space encode apart exactly as together. An answer begins
there, so the ids of its prompt are the beginning of those of the whole conversation.
"""

import codecs
import hashlib
import re
from pathlib import Path

import numpy as np
import sentencepiece as spm

from lib.config import UserError, refusing, write_whole
from lib.folders import refuse_pointer

PAD, BOS, EOS, UNK = 0, 1, 2, 3
IGNORE = -100  # the label of a position that is not supervised, as torch's cross_entropy has it
SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
MARKERS = IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPACE = "\u2581"  # a space inside a piece, as SentencePiece writes it
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# protobuf: normalizer_spec {add_dummy_prefix: false}; the last value of a field counts
NO_DUMMY_PREFIX = b"\x1a\x02\x18\0"

# ---- text and ids


class Tokenizer:
    """A trained SentencePiece model: ours, or a foreign one such as Llama's `tokenizer.model`.

    model         the .model file as bytes; `sha256` is their hash
    pieces        the vocabulary as SentencePiece spells it; V = `vocab_size` of them
    controls      {symbol: id}; a foreign folder's tokenizer_config.json, `config`, may add some
    template      the chat template named by the folder it came from, "jinja" for its own, or None
    special_ids   {"pad": id, "bos": id, "eos": id, "unk": id} of those that it has
    end_ids       the ids that end an answer by the folder's generation_config.json
    dummy_prefix  whether it puts a space before every text
    opening       the ids before a text that a model continues: [BOS], or none
    adds_bos      whether transformers puts BOS there, too; None in our folders: it does not
    exact         whether `save` wrote the folder, so that there are no other ids

    Without BOS and chat markers `bos_id`, `im_start_id` and `im_end_id` are None, without padding
    `pad_id` is EOS. A text to continue has not ended: a folder's EOS after texts is left out.
    """

    file = "tokenizer.model"  # the name of `model` in a folder
    unreadable = "not a SentencePiece model, or a damaged one"

    def __init__(self, model, source="tokenizer.model", config=None):
        from lib.conversation import folder_template

        ours = config is None or "tokenizer_model_sha256" in config
        self.config = config = config or {}
        self.adds_bos = config.get("add_bos_token", None if ours else False)
        self.model, self.source, self.exact = model, source, False
        self.sha256, self.end_ids = hashlib.sha256(model).hexdigest(), config.get("end_ids", [])
        self.added = {}  # {symbol: its flags} of symbols beside the model's pieces
        self.template, self.templates = folder_template(config, source), {}  # see find_template
        try:
            ids = dict.fromkeys(SPECIALS, -1) | self._open(model)
            self.dummy_prefix = self._bytes[self.encode("a")[0]].startswith(b" ")
            self.model_size = len(self.pieces)  # ids of `model` alone
            self._add_symbols(config.get("added_tokens_decoder", {}))
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in many ways
            beside = ", or tokenizer_config.json beside it is" if config else ""
            raise UserError(f"{source}: {self.unreadable}{beside}") from error
        self._set_roles(ids)
        self.opening = self._find_opening()

    def _open(self, model):
        """Sets `pieces` and the text of each, `_bytes`; returns {role: id}, -1 for none."""
        self._spm = sp = spm.SentencePieceProcessor()
        sp.load_from_serialized_proto(model)
        self._inner = spm.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.pieces = [sp.id_to_piece(id) for id in range(sp.get_piece_size())]
        control = [sp.is_control(id) or sp.is_unknown(id) for id in range(len(self.pieces))]
        self._bytes = [b"" if c else spell(piece) for c, piece in zip(control, self.pieces)]
        return {role: getattr(sp, f"{role}_id")() for role in SPECIALS}

    def _set_roles(self, ids):
        """Sets bos_id, eos_id, ...: what `config` names, else the model's own `ids`, {role: id}."""
        for role in SPECIALS:
            symbol = self.config.get(f"{role}_token")
            if symbol is not None and (str(symbol) in self.controls or role in ("bos", "eos")):
                ids[role] = self.controls.get(str(symbol), -1)
            if ids[role] < 0 and (role == "eos" or (role == "bos" and symbol is not None)):
                problem = f"no control symbol is the {role}_token; name one"
                raise UserError(f"{self.source}: {problem} in tokenizer_config.json")
        has_bos = ids["bos"] >= 0 and self.config.get("bos_token", "") is not None
        self.bos_id, self.eos_id = ids["bos"] if has_bos else None, ids["eos"]
        self.unk_id, self.pad_id = ids["unk"], ids["pad"] if ids["pad"] >= 0 else ids["eos"]
        roles = {role: getattr(self, f"{role}_id") for role in SPECIALS}
        self.special_ids = {role: id for role, id in roles.items() if id not in (None, -1)}

    def _find_opening(self):
        return [] if self.bos_id is None or self.adds_bos is False else [self.bos_id]

    def _add_symbols(self, added):
        """Adds the control symbols of a folder, {id: {"content": symbol, ...}}."""
        symbols = {int(id): token["content"] for id, token in added.items()}
        self.added |= {token["content"]: token for token in added.values()}
        for id, symbol in symbols.items():
            special = added[str(id)].get("special", True) or re.fullmatch(r"<.+>|\[.+\]", symbol)
            if not 0 <= id < 1 << 20 or not isinstance(symbol, str):
                raise ValueError(id)
            if id >= self.model_size and not special:
                word = f"the folder adds the word {symbol!r}, which SentencePiece would not find"
                remedy = "move this file away, so that its tokenizer.json is read"
                raise UserError(f"{self.source}: {word}; {remedy}")
        self._add_controls(max(symbols, default=-1) + 1, symbols)

    def _add_controls(self, size, symbols):
        """Adds control symbols up to `size` ids in all; those without a name are unused."""
        for id in range(len(self.pieces), size):
            self.pieces.append(symbols.get(id, f"<unused_{id}>"))
            self._bytes.append(b"")
        self.vocab_size = len(self.pieces)
        self.controls = {piece: id for id, piece in enumerate(self.pieces) if not self._bytes[id]}
        self.im_start_id, self.im_end_id = map(self.controls.get, MARKERS)

    @classmethod
    def load(cls, path):
        """Returns the Tokenizer of a .model file or a folder; UserError if missing or broken.

        A training's folder stands for its final/. A folder that `save` wrote names the hash of its
        model, which is verified. A tokenizer.json without a tokenizer.model is read by the package
        `tokenizers`.
        """
        path, kind, config = Path(path), cls, None
        if path.is_dir():
            from lib.tokenizer_json import JSONTokenizer, read_tokenizer_config

            kinds = [kind for kind in (cls, JSONTokenizer) if (path / kind.file).exists()]
            if not kinds and (path / "final").is_dir():
                return cls.load(path / "final")
            kind, config = kinds[0] if kinds else cls, read_tokenizer_config(path)
            path = path / kind.file
        expected = "a tokenizer is a SentencePiece .model file, or a model's or a training's folder"
        with refusing(OSError, path, expected):
            refuse_pointer(path)
            model = path.read_bytes()
        tokenizer = kind(model, str(path), config)
        sha256 = (config or {}).get("tokenizer_model_sha256")
        tokenizer.exact = kind is cls and sha256 is not None
        if tokenizer.exact and tokenizer.sha256 != sha256:
            raise UserError(f"{path}: checksum mismatch: it is damaged, or from another model")
        return tokenizer

    def match(self, size, folder):
        """Adapts to the model in `folder`, whose vocabulary another program may have rounded up."""
        if size < self.vocab_size or (self.exact and size > self.vocab_size):
            sizes = f"the model has {size} tokens, its tokenizer {self.vocab_size}"
            raise UserError(f"{folder}: {sizes}; they do not belong together")
        self._add_controls(size, {})

    def encode(self, text):
        """Returns the ids of a text, never a control id; UserError for a lone surrogate.

        A literal U+2581, which SentencePiece takes for a space, is encoded as its three bytes.
        """
        check_unicode(text)
        first, *rest = text.split(SPACE)
        ids = self._spm.encode(first)
        for part in rest:
            ids += self._space_ids + self._inner.encode(part)
        return ids

    def prompt_ids(self, text):
        """Returns the ids of a text to continue, as transformers' `generate` gets them.

        An empty text is the beginning of a document, BOS; UserError if there is none.
        """
        ids = [*self.opening, *self.encode(text)]
        if not ids and self.bos_id is None:
            problem = "the prompt is empty, and this tokenizer has no BOS to begin with"
            raise UserError(f"{self.source}: {problem}; give a prompt")
        return ids or [self.bos_id]

    def encode_spans(self, text, begins=True):
        """Returns (ids, starts (N,), ends (N,)): also which characters of `text` each id is of.

        begins: no control token precedes it, for tokenizers that tell.
        """
        ids = self.encode(text)
        characters = np.cumsum(np.frombuffer(text.encode(), np.uint8) >> 6 != 0b10) - 1  # of bytes
        ends = np.cumsum([0, *(len(self._bytes[id]) for id in ids)])
        ends = np.maximum(0, ends - ends[-1] + len(characters))  # of a dummy prefix: the first
        return ids, characters[ends[:-1]], characters[np.maximum(0, ends[1:] - 1)] + 1

    def encode_batch(self, texts, num_threads=1):
        """Returns the ids of each text, as `encode` does, on `num_threads` threads."""
        for text in texts:
            check_unicode(text)
        rows = self._spm.encode(list(texts), num_threads=num_threads)
        return [self.encode(text) if SPACE in text else row for text, row in zip(texts, rows)]

    def decode(self, ids, controls=False):
        """Returns the text of ids; control ids vanish, or are written by name with `controls`."""
        stream = self.stream(controls=controls)
        return "".join([*map(stream.push, ids), stream.flush()])

    def first_text(self, spelled):
        """Returns the UTF-8 of the first id of a text without the dummy prefix."""
        return spelled.removeprefix(b" ") if self.dummy_prefix else spelled

    def spelled(self, id, controls=True):
        """Returns the UTF-8 of an id within a text; of a control id its name, or nothing."""
        if not 0 <= id < self.vocab_size:
            raise UserError(f"token id {id} is outside 0..{self.vocab_size - 1}")
        return self._bytes[id] or (self.pieces[id].encode() if controls else b"")

    def stream(self, begun=False, controls=False):
        """Returns a decoder for ids that arrive one by one; begun: they continue a text."""
        return Stream(self, begun, controls)

    def token_bytes(self):
        """Returns (V,) int64: the UTF-8 bytes of text an id stands for, 0 for control ids."""
        return np.array([len(text) for text in self._bytes], dtype=np.int64)

    @property
    def scores(self):
        """SentencePiece's score of each id: the merge with the higher result goes first."""
        scores = [self._spm.get_score(id) for id in range(self.model_size)]
        return scores + [0.0] * (self.vocab_size - self.model_size)

    def save(self, folder, max_length, template=None):
        """Writes tokenizer.model and the files of AutoTokenizer into a model folder.

        max_length: the model's context in tokens. template: what the model is trained in.
        """
        from lib.tokenizer_json import files_of

        files = files_of(self, max_length, template or self.template)
        for name, content in ({self.file: self.model} | files).items():
            write_whole(Path(folder) / name, content)


class Stream:
    """Decodes ids as they arrive: its output, flush included, is `decode` of all the ids pushed."""

    def __init__(self, tokenizer, begun=False, controls=False):
        self._tokenizer, self._begun, self._controls = tokenizer, begun, controls
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        """Returns the text that an id completes: whole characters, so "" within an emoji."""
        spelled = self._tokenizer.spelled(id, self._controls)
        if spelled and not self._begun:
            self._begun, spelled = True, self._tokenizer.first_text(spelled)
        return self._utf8.decode(spelled)

    def flush(self):
        """Returns the rest at the end: "", or U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def spell(piece):
    """Returns the UTF-8 of a piece: a byte for "<0x41>", else its characters."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def check_unicode(text):
    """Raises UserError for a text with a lone surrogate, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        name = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f"not Unicode text: lone surrogate {name}") from None
