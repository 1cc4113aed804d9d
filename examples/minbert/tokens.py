"""Sentences as tokens: WordPiece, from a model's own vocabulary or one learned from the sentences at hand."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor
from torch.nn import functional as F

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LEARNED = 2000
"""The most tokens of a vocabulary that is learned."""


class Tokens(NamedTuple):
    """B sentences, each from the first column on, the shorter ones padded.

    Attributes:
        ids: (B, L) int64.
        mask: (B, L) bool, False where there is padding.
    """

    ids: Tensor
    mask: Tensor


class Tokenizer:
    """WordPiece as BERT does it, with [CLS] before each sentence and [SEP] behind.

    Attributes:
        vocabulary: how many tokens it knows.
    """

    def __init__(self, wordpiece: tokenizers.Tokenizer | BertWordPieceTokenizer) -> None:
        self.wordpiece = wordpiece
        self.vocabulary = wordpiece.get_vocab_size()

    @classmethod
    def of(cls, directory: Path) -> "Tokenizer":
        """That of a model's directory: ``tokenizer.json`` or, where there is none, ``vocab.txt``."""
        if (directory / "tokenizer.json").is_file():
            return cls(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
        told = directory / "tokenizer_config.json"
        lowercase = json.loads(told.read_text()).get("do_lower_case", True) if told.is_file() else True
        return cls(BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=lowercase))

    @classmethod
    def learned(cls, sentences: Iterable[str]) -> "Tokenizer":
        """One of at most ``LEARNED`` tokens that says these sentences in few; the same for the same sentences."""
        sentences, wordpiece = list(sentences), BertWordPieceTokenizer()
        letters = sorted({c for s in sentences for c in wordpiece.normalize(s) if not c.isspace()})
        # Left to itself the trainer numbers the ##letters as a hash map lists them, and pieces that are as frequent as
        # each other by those numbers.
        first = [*SPECIAL, *letters, *(f"##{c}" for c in letters)]
        wordpiece.train_from_iterator(sentences, LEARNED, special_tokens=first, show_progress=False)
        return cls(BertWordPieceTokenizer(wordpiece.get_vocab()))

    def encode(self, sentences: Sequence[str], max_length: int = 128) -> Tokens:
        """B sentences, padded to the longest of them; what is beyond ``max_length`` tokens of one is cut off.

        Raises:
            ValueError: there is no sentence, or no place in ``max_length`` for a token between [CLS] and [SEP].
        """
        if not sentences:
            raise ValueError("sentences must not be empty")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3, got {max_length}")
        self.wordpiece.enable_truncation(max_length)
        self.wordpiece.enable_padding()
        found = self.wordpiece.encode_batch(list(sentences))
        ids = torch.tensor([sentence.ids for sentence in found])
        return Tokens(ids, torch.tensor([sentence.attention_mask for sentence in found], dtype=torch.bool))


def together(several: Sequence[Tokens]) -> Tokens:
    """All their sentences in one batch, padded to the longest."""
    longest = max(tokens.ids.shape[1] for tokens in several)
    padded = [[F.pad(x, (0, longest - x.shape[1])) for x in tokens] for tokens in several]
    return Tokens(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
