"""The three tasks' sentences: from the course project's files or made up, and as batches of tokens."""

import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.minbert.tokens import Tokens
from gradkern.sampling.stream import derived_seed

TASKS = ("sst", "para", "sts")
"""Sentiment in five classes, paraphrase or not, similarity from 0 to 5; in this order everywhere."""
CLASSES = {"sst": 5, "para": 2}
"""Of the tasks that classify; the third predicts a number."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence, or a pair of them, and what people said of it: a class, or a similarity from 0 to 5."""

    id: str
    sentences: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Layout:
    """Of a task's files: how their names begin, the columns that are read, and what a label may be."""

    name: str
    sentences: tuple[str, ...]
    label: str
    most: int
    whole: bool

    def __str__(self) -> str:
        return f"{self.label} must be {'a whole number' if self.whole else 'a number'} from 0 to {self.most}"


LAYOUTS = {
    "sst": Layout("ids-sst", ("sentence",), "sentiment", 4, whole=True),
    "para": Layout("quora", ("sentence1", "sentence2"), "is_duplicate", 1, whole=True),
    "sts": Layout("sts", ("sentence1", "sentence2"), "similarity", 5, whole=False),
}
SHOWN = 20
"""Malformed rows that a message lists; the others it counts."""
Examples = dict[str, list[Example]]
"""Of each task."""


def read(directory: Path, split: str, on_malformed: Callable[[str], object] | None = None) -> Examples:
    """The course project's files: tab-separated, quoted as CSV, in UTF-8, with a header that names the columns.

    A row is malformed if its quotes do not close, it has more or fewer fields than the header, a sentence is empty, or
    the label is none: 0 … 4 (sst), 0 or 1 (para), 0 to 5 (sts).

    Args:
        directory: with ``ids-sst-{split}.csv``, ``quora-{split}.csv`` and ``sts-{split}.csv``.
        split: "train" or "dev".
        on_malformed: is told of malformed rows, by file and line, which are then left out; None to raise instead.

    Raises:
        FileNotFoundError: of all files that are not there.
        ValueError: a file lacks a column or has no example, or rows are malformed: of all files in one message.
    """
    paths = {task: Path(directory) / f"{layout.name}-{split}.csv" for task, layout in LAYOUTS.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"directory={str(directory)!r} has no {', '.join(missing)}")
    found: Examples = {}
    malformed: list[str] = []
    for task, path in paths.items():
        found[task], wrong = _read(path, LAYOUTS[task])
        malformed += wrong
    if malformed:
        told = f"{len(malformed)} malformed row{'s' * (len(malformed) > 1)}:"
        told = "\n  ".join([told, *malformed[:SHOWN]])
        told += f"\n  and {len(malformed) - SHOWN} more" if len(malformed) > SHOWN else ""
        if on_malformed is None:
            raise ValueError(told)
        on_malformed(f"left out {told}")
    for task, path in paths.items():
        if not found[task]:
            raise ValueError(f"{path} has no example")
    return found


def _read(path: Path, layout: Layout) -> tuple[list[Example], list[str]]:
    """The examples of a file, and what is wrong with its other rows."""
    examples: list[Example] = []
    malformed: list[str] = []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # so that a bad byte has its line
        rows = csv.reader(file, delimiter="\t", strict=True)
        header = next(rows, [])
        absent = [name for name in ("id", *layout.sentences, layout.label) if name not in header]
        if absent:
            raise ValueError(f"{path}:1: no column {', '.join(map(repr, absent))}; the columns are {header}")
        while True:
            line = rows.line_num + 1
            try:
                examples.append(_example(header, next(rows), layout))
            except StopIteration:
                return examples, malformed
            except (csv.Error, ValueError) as error:
                to = f" to {rows.line_num}" if rows.line_num > line else ""  # an open quote swallows lines
                malformed.append(f"{path}:{line}{to}: {error}")


def _example(header: list[str], fields: list[str], layout: Layout) -> Example:
    if len(fields) != len(header):
        raise ValueError(f"{len(header)} fields expected, got {len(fields)}")
    row = {name: field.strip() for name, field in zip(header, fields, strict=True)}
    for name in layout.sentences:
        if not row[name]:
            raise ValueError(f"{name} is empty")
        if any("\udc80" <= c <= "\udcff" for c in row[name]):
            raise ValueError(f"{name} is not UTF-8: {row[name]!r:.200}")
    try:
        label = float(row[layout.label])
    except ValueError:
        label = math.nan
    if not 0 <= label <= layout.most or (layout.whole and label != int(label)):
        raise ValueError(f"{layout}, got {row[layout.label]!r:.200}")
    return Example(row["id"], tuple(row[name] for name in layout.sentences), label)


def synthetic(seed: int, n: int = 256) -> dict[str, Examples]:
    """Made-up sentences that can be learned: "train" with n examples of each task, "dev" with a quarter as many others.

    - sst: how good something is said to be, by one of ten adjectives or a neutral one, weakly or strongly.
    - para: two questions on one topic, or on two.
    - sts: how many of the five things in one sentence the other has too.

    Pairs that belong together are the more often on the first half of the topics, so that something can be learned by
    heads too that add up what they find in either sentence and cannot compare them.

    Args:
        seed: another one, other sentences.
        n: from 4 to 4,000; of pairs on one topic there are not many more.

    Raises:
        ValueError: ``n`` is too small or too large.
    """
    if not 4 <= n <= 4000:
        raise ValueError(f"n must be from 4 to 4,000, got {n}")
    rng = random.Random(seed)
    made = {task: _distinct(task, make, n + n // 4, rng) for task, make in MAKERS.items()}
    return {
        "train": {task: examples[:n] for task, examples in made.items()},
        "dev": {task: examples[n:] for task, examples in made.items()},
    }


Maker = Callable[[int, random.Random], tuple[tuple[str, ...], int]]
"""The k-th example's sentences and label: labels take turns, so that none is rare."""

NEGATIVE = ("awful", "boring", "clumsy", "dreadful", "stupid")
NEUTRAL = ("average", "familiar", "long", "quiet", "usual")
POSITIVE = ("brilliant", "charming", "delightful", "moving", "wonderful")
WEAKLY, STRONGLY = ("fairly", "rather", "somewhat"), ("absolutely", "incredibly", "utterly")
TOPICS = (
    ("bread", "butter", "cake", "flour", "oven", "recipe"),
    ("bank", "credit", "loan", "money", "savings", "tax"),
    ("brush", "canvas", "color", "drawing", "paint", "portrait"),
    ("band", "concert", "guitar", "melody", "piano", "song"),
    ("engine", "garage", "road", "tire", "traffic", "wheel"),
    ("bird", "cat", "dog", "feather", "horse", "tail"),
    ("ball", "coach", "goal", "match", "referee", "team"),
    ("cloud", "rain", "snow", "storm", "thunder", "wind"),
)
FAMILIAR, OTHER = TOPICS[:4], TOPICS[4:]
THINGS, FAMILIAR_THINGS, OTHER_THINGS = ([word for topic in of for word in topic] for of in (TOPICS, FAMILIAR, OTHER))


def _sentiment(k: int, rng: random.Random) -> tuple[tuple[str, ...], int]:
    adjectives, degrees = (
        (NEGATIVE, STRONGLY),
        (NEGATIVE, WEAKLY),
        (NEUTRAL, WEAKLY + STRONGLY),
        (POSITIVE, WEAKLY),
        (POSITIVE, STRONGLY),
    )[k % 5]
    what = rng.choice(("acting", "book", "director", "ending", "film", "music", "plot", "story"))
    who = rng.choice(
        ("critics say", "he thought", "i found", "my friends agree", "people said", "she wrote", "we felt")
    )
    return (
        f"{who} the {what} about the {rng.choice(THINGS)} was {rng.choice(degrees)} {rng.choice(adjectives)}",
    ), k % 5


def _paraphrase(k: int, rng: random.Random) -> tuple[tuple[str, ...], int]:
    same = k % 2
    topic = rng.choice(FAMILIAR if rng.random() < 0.2 + 0.6 * same else OTHER)
    other = rng.choice([t for t in TOPICS if t != topic])
    a, b, c = rng.sample(topic, 3)
    d, e = rng.sample([word for word in topic if word not in (a, b, c)] if same else other, 2)
    return (f"what does the {a} have to do with the {b} and the {c}", f"how do i choose the {d} and the {e}"), same


def _similarity(k: int, rng: random.Random) -> tuple[tuple[str, ...], int]:
    common = k % 6
    n = 10 - common
    familiar = sum(rng.random() < 0.2 + 0.6 * common / 5 for _ in range(n))
    words = [*rng.sample(FAMILIAR_THINGS, familiar), *rng.sample(OTHER_THINGS, n - familiar)]
    rng.shuffle(words)
    first, second = words[:5], words[:common] + words[5:]
    rng.shuffle(second)
    return tuple("there is the {} , the {} , the {} , the {} and the {}".format(*of) for of in (first, second)), common


MAKERS: dict[str, Maker] = {"sst": _sentiment, "para": _paraphrase, "sts": _similarity}


def _distinct(task: str, make: Maker, n: int, rng: random.Random) -> list[Example]:
    """``n`` examples with no two alike, so that none to learn from is among those to be judged by."""
    found: dict[tuple[str, ...], Example] = {}
    while len(found) < n:
        k = len(found)
        sentences, label = make(k, rng)
        found.setdefault(sentences, Example(f"{task}-{k}", sentences, float(label)))
    return list(found.values())


@dataclass(frozen=True)
class Batch:
    """B examples of one task.

    Attributes:
        tokens: one, or two of a task of pairs: ``ids`` (B, L) int64 and ``mask`` (B, L) bool, L the longest of the B.
        labels: (B,), int64 classes (sst) or float32 (para: 0 or 1; sts: 0 to 5).
    """

    tokens: tuple[Tokens, ...]
    labels: Tensor


class Tokenized(Dataset[Batch]):
    """A task's examples, tokenized once, on the device they train on; whole batches are drawn from it."""

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Callable[[list[str]], Tokens],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.labels = torch.tensor([example.label for example in examples], dtype=dtype, device=device)
        whole = [encode(list(sentences)) for sentences in zip(*(e.sentences for e in examples), strict=True)]
        self.lengths = [tokens.mask.sum(1).cpu() for tokens in whole]  # on the host, that no batch waits for the device
        self.tokens = [Tokens(tokens.ids.to(device), tokens.mask.to(device)) for tokens in whole]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: list[int]) -> Batch:
        rows = torch.tensor(places)
        of_sentences = []
        for tokens, lengths in zip(self.tokens, self.lengths, strict=True):
            longest = int(lengths[rows].max())
            of_sentences.append(Tokens(tokens.ids[rows, :longest], tokens.mask[rows, :longest]))
        return Batch(tuple(of_sentences), self.labels[rows])


def loaders(
    examples: Examples,
    encode: Callable[[list[str]], Tokens],
    batch_sizes: Sequence[int],
    seed: int | None,
    device: torch.device,
) -> list[DataLoader[Batch]]:
    """A loader of batches for each task, as ``TaskSampler`` takes them: a state of its resumes them to the bit.

    None of them draws from torch's default generator, so that looking at scores leaves dropout as it was.

    Args:
        examples: of each of ``TASKS``.
        encode: sentences to tokens, padded on the right to the longest.
        batch_sizes: of each task.
        seed: of the order, another in each pass; None for the order of ``examples``.
        device: where batches are.

    Raises:
        ValueError: not a batch size for each task.
    """
    if len(batch_sizes) != len(TASKS):
        raise ValueError(f"batch_sizes must be {len(TASKS)} numbers, one for each of {TASKS}; got {batch_sizes!r}")
    made = []
    for t, task in enumerate(TASKS):
        dataset = Tokenized(examples[task], encode, torch.int64 if task == "sst" else torch.float32, device)
        generator = torch.Generator().manual_seed(derived_seed(seed or 0, t))
        made.append(
            DataLoader(dataset, batch_sizes[t], shuffle=seed is not None, generator=generator, collate_fn=lambda b: b)
        )
    return made
