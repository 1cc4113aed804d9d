"""Tokenization by WordPiece, with a model's vocabulary or with one trained on the given sentences."""

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
TRAINED_SIZE = 2000
"""Largest size of a trained vocabulary."""


class Tokens(NamedTuple):
    """Tokens of B sentences, padded on the right.

    Attributes:
        ids: token ids, (B, L) int64.
        mask: (B, L) bool, False at padding.
    """

    ids: Tensor
    mask: Tensor


class Tokenizer:
    """BERT's WordPiece tokenizer, which puts [CLS] before each sentence and [SEP] after it.

    Attributes:
        vocabulary: number of tokens in the vocabulary.
    """

    def __init__(self, wordpiece: tokenizers.Tokenizer | BertWordPieceTokenizer) -> None:
        self.wordpiece = wordpiece
        self.vocabulary = wordpiece.get_vocab_size()

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer of a model's directory: ``tokenizer.json``, or else ``vocab.txt``."""
        if (directory / "tokenizer.json").is_file():
            return cls(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
        config = directory / "tokenizer_config.json"
        lowercase = json.loads(config.read_text()).get("do_lower_case", True) if config.is_file() else True
        return cls(BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=lowercase))

    @classmethod
    def trained(cls, sentences: Iterable[str]) -> "Tokenizer":
        """Train a vocabulary of at most ``TRAINED_SIZE`` tokens; the same sentences give the same vocabulary."""
        sentences, wordpiece = list(sentences), BertWordPieceTokenizer()
        letters = sorted({c for s in sentences for c in wordpiece.normalize(s) if not c.isspace()})
        # Without this list the trainer would number the ##letters in the order of a hash map, and order equally
        # frequent pieces by these numbers.
        first = [*SPECIAL, *letters, *(f"##{c}" for c in letters)]
        wordpiece.train_from_iterator(sentences, TRAINED_SIZE, special_tokens=first, show_progress=False)
        return cls(BertWordPieceTokenizer(wordpiece.get_vocab()))

    def encode(self, sentences: Sequence[str], max_length: int = 128) -> Tokens:
        """Encode B sentences, truncated to ``max_length`` tokens and padded to the longest.

        Raises:
            ValueError: there is no sentence, or ``max_length`` has no room for a token between [CLS] and [SEP].
        """
        if not sentences:
            raise ValueError("sentences must not be empty")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3, got {max_length}")
        self.wordpiece.enable_truncation(max_length)
        self.wordpiece.enable_padding()
        encodings = self.wordpiece.encode_batch(list(sentences))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return Tokens(ids, torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool))


def concatenate(batches: Sequence[Tokens]) -> Tokens:
    """Concatenate batches of sentences into one, padded to the longest."""
    longest = max(tokens.ids.shape[1] for tokens in batches)
    padded = [[F.pad(x, (0, longest - x.shape[1])) for x in tokens] for tokens in batches]
    return Tokens(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
