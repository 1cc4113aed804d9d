"""Synthetic sentences for the three tasks, for runs without data."""

import random
from collections.abc import Callable

from examples.minbert.examples import Example, Examples


def synthetic(seed: int, n: int = 256) -> dict[str, Examples]:
    """Return learnable sentences: "train" with n examples of each task, "dev" with a quarter as many others.

    - sst: an opinion in one of ten adjectives or a neutral one, weak or strong.
    - para: two questions on the same topic, or on different topics.
    - sts: two sentences with five things each, labelled by the number of things they share.

    Pairs with a high label are more often on the first half of the topics. Heads that only add what they find in each
    sentence, and cannot compare them, can therefore learn something too.

    Args:
        seed: seed of the sentences.
        n: number from 4 to 4,000; there are not many more pairs on the same topic.

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
"""Function that returns the k-th example's sentences and label; the labels cycle with k, so that none is rare."""

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
    """Return ``n`` different examples, so that no training example is in the dev set."""
    found: dict[tuple[str, ...], Example] = {}
    while len(found) < n:
        k = len(found)
        sentences, label = make(k, rng)
        found.setdefault(sentences, Example(f"{task}-{k}", sentences, float(label)))
    return list(found.values())
