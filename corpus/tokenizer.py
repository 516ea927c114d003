"""A vocabulary learned from text: the recipe that lib/tokenizer.py describes, for SentencePiece."""

import io
import re

import sentencepiece as spm

from lib.config import UserError, write_whole
from lib.tokenizer import BOS, EOS, IM_END, IM_START, PAD, SPACE, SPECIALS, UNK, Tokenizer

CUT = "\uffff"  # no piece may cross it; Unicode promises never to make it a character
LINE_BREAKS = re.compile(r"[\r\n]+")
# SentencePiece would drop a text with one of these
UNTRAINABLE = re.compile(f"[\0\ud800-\udfff{SPACE}\u2585{CUT}]")

RECIPE = dict(
    model_type="bpe",
    byte_fallback=True,  # a character outside the vocabulary becomes its UTF-8 bytes, never <unk>
    character_coverage=0.9995,  # the rarest 0.05 % of characters are left to their bytes
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,  # indentation is worth a piece
    split_digits=True,
    pretokenization_delimiter=CUT,
    max_sentence_length=2**30,  # the default drops texts of more than 4,192 bytes
    pad_id=PAD,
    bos_id=BOS,
    eos_id=EOS,
    unk_id=UNK,
    control_symbols=[IM_START, IM_END],
    num_threads=4,  # constant: it is part of the file, whose sha256 must be the same everywhere
    minloglevel=2,
    **{f"{role}_piece": name for role, name in SPECIALS.items()},
)


def train_tokenizer(texts, path, vocab_size):
    """Learns a vocabulary of `vocab_size` ids from `texts`, writes it to the .model file `path`.

    Returns the Tokenizer. The same texts in the same order give the same bytes on any machine.
    Memory holds the texts, and SentencePiece about ten bytes a character more: give it a sample of
    a large corpus. Raises UserError if vocab_size is too large for the texts or too small for their
    characters.
    """
    texts = [LINE_BREAKS.sub(rf"{CUT}\g<0>{CUT}", UNTRAINABLE.sub(" ", text)) for text in texts]
    if not any(texts):
        raise UserError("no text to train a tokenizer on: no documents, or all are empty")
    train, model = spm.SentencePieceTrainer.train, io.BytesIO()
    files = {"sentence_iterator": iter(texts), "model_writer": model}
    try:
        train(**files, vocab_size=max(vocab_size, 6), **RECIPE)
    except RuntimeError as error:
        number = re.search(r"value <= (\d+)|required_chars\. \d+ vs (\d+)", str(error))
        if number is None:
            raise
        most, least = number.groups()
        remedy = f"too large for these texts: set vocab_size={most} or give more text"
        if least:
            remedy = f"too small: specials, bytes and the texts' characters need at least {least}"
        raise UserError(f"vocab_size {vocab_size} is {remedy}") from None
    write_whole(path, model.getvalue())
    return Tokenizer(model.getvalue(), str(path))
