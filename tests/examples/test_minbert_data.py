"""The three tasks' data and measures: files, synthetic sentences, batches, and scores."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("tokenizers", reason="tokenizes the sentences")
pytest.importorskip("safetensors", reason="reads the weights")

from examples.minbert.batches import Batch, loaders
from examples.minbert.examples import TASKS, Example, Examples
from examples.minbert.files import MAX_LISTED, read
from examples.minbert.measures import Scores, classification_measures, evaluate, pearson, scores
from examples.minbert.synthetic import synthetic
from examples.minbert.tokens import Tokens
from gradkern.sampling import TaskSampler

CPU = torch.device("cpu")
GOOD = {
    "ids-sst": ["\tid\tsentence\tsentiment", "0\ta1\tGood film.\t4", '1\ta2\t"A ""bad"" one"\t0'],
    "quora": ["\tid\tsentence1\tsentence2\tis_duplicate", "0\tb1\tWhy?\tWhat for?\t1.0", "1\tb2\tWho?\tWhere?\t0"],
    "sts": ["\tid\tsentence1\tsentence2\tsimilarity", "0\tc1\tOne dog.\tTwo dogs.\t3.25", "1\tc2\tA\tB\t0"],
}


def written(folder: Path, **changed: list[str]) -> Path:
    """Write the three files of a training set, some changed; underscores in their names replace hyphens."""
    for name, lines in (GOOD | {name.replace("_", "-"): lines for name, lines in changed.items()}).items():
        folder.joinpath(f"{name}-train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def encode(sentences: list[str]) -> Tokens:
    """Encode each word as its length, padded with -1."""
    words = [[len(word) for word in sentence.split()] for sentence in sentences]
    longest = max(map(len, words))
    ids = torch.tensor([row + [-1] * (longest - len(row)) for row in words])
    return Tokens(ids, ids >= 0)


def test_files_are_read_by_their_header(tmp_path: Path) -> None:
    other_order = ["similarity\tsentence2\tid\tsentence1", "3.25\tTwo dogs.\tc1\tOne dog.", "0\tB\tc2\tA"]
    for folder, sts in ((tmp_path / "a", GOOD["sts"]), (tmp_path / "b", other_order)):
        folder.mkdir()
        assert read(written(folder, sts=sts), "train") == {
            "sst": [Example("a1", ("Good film.",), 4.0), Example("a2", ('A "bad" one',), 0.0)],
            "para": [Example("b1", ("Why?", "What for?"), 1.0), Example("b2", ("Who?", "Where?"), 0.0)],
            "sts": [Example("c1", ("One dog.", "Two dogs."), 3.25), Example("c2", ("A", "B"), 0.0)],
        }


MALFORMED = {
    "1\ta2\tno label": "4 fields expected, got 3",
    "1\ta2\ttoo\tmany\t3": "4 fields expected, got 5",
    "": "4 fields expected, got 0",
    "1\ta2\tempty label\t": "sentiment must be a whole number from 0 to 4, got ''",
    "1\ta2\tout of range\t5": "got '5'",
    "1\ta2\tbelow\t-1": "got '-1'",
    "1\ta2\tbetween\t2.5": "got '2.5'",
    "1\ta2\tnot a number\tgood": "got 'good'",
    "1\ta2\tNaN\tnan": "got 'nan'",
    "1\ta2\tinfinite\tinf": "got 'inf'",
    "1\ta2\t  \t3": "sentence is empty",
    '1\ta2\t"so" he said\t3': "expected after",
}


@pytest.mark.parametrize(("row", "why"), MALFORMED.items())
def test_a_malformed_row_is_reported_by_file_and_line(tmp_path: Path, row: str, why: str) -> None:
    lines = GOOD["ids-sst"]
    folder = written(tmp_path, ids_sst=[*lines[:2], row, lines[2]])
    with pytest.raises(ValueError, match="1 malformed row:") as raised:
        read(folder, "train")
    assert f"{folder / 'ids-sst-train.csv'}:3: " in str(raised.value)
    assert why in str(raised.value)
    messages: list[str] = []
    assert [e.id for e in read(folder, "train", on_malformed=messages.append)["sst"]] == ["a1", "a2"]
    assert messages == [f"left out {raised.value}"]


def test_labels_of_pairs_have_their_own_range(tmp_path: Path) -> None:
    quora, sts = GOOD["quora"], GOOD["sts"]
    folder = written(tmp_path, quora=[*quora, "2\tb3\tA\tB\t2"], sts=[*sts, "2\tc3\tA\tB\t5.01", "3\tc4\tA\t\t5"])
    with pytest.raises(ValueError, match="3 malformed rows") as raised:
        read(folder, "train")
    message = str(raised.value).splitlines()
    assert message[1].endswith("quora-train.csv:4: is_duplicate must be a whole number from 0 to 1, got '2'")
    assert message[2].endswith("sts-train.csv:4: similarity must be a number from 0 to 5, got '5.01'")
    assert message[3].endswith("sts-train.csv:5: sentence2 is empty")


def test_a_quote_that_spans_lines_is_reported_with_all_of_them(tmp_path: Path) -> None:
    folder = written(tmp_path, ids_sst=[*GOOD["ids-sst"], '2\ta3\t"open\t3', "3\ta4\tlost\t3"])
    with pytest.raises(ValueError, match=r"ids-sst-train\.csv:4 to 5: unexpected end of data"):
        read(folder, "train")


def test_bytes_that_are_not_utf_8_have_their_line(tmp_path: Path) -> None:
    path = written(tmp_path) / "ids-sst-train.csv"
    path.write_bytes(path.read_bytes().replace(b"Good", "Très".encode("latin-1")))
    with pytest.raises(ValueError, match=r"ids-sst-train\.csv:2: sentence is not UTF-8"):
        read(tmp_path, "train")


def test_many_malformed_rows_are_listed_in_part_and_counted(tmp_path: Path) -> None:
    folder = written(tmp_path, ids_sst=[*GOOD["ids-sst"], *["x"] * (MAX_LISTED + 7)])
    with pytest.raises(ValueError, match=f"{MAX_LISTED + 7} malformed rows:") as raised:
        read(folder, "train")
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + MAX_LISTED + 1
    assert lines[-1].strip() == "and 7 more"


def test_missing_files_columns_and_examples_raise(tmp_path: Path) -> None:
    folder = written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ids-sst-dev\.csv, quora-dev\.csv, sts-dev\.csv"):
        read(folder, "dev")
    written(folder, sts=["\tid\tsentence1\tsentence2", "0\tc1\tA\tB"])  # like the course's test files
    with pytest.raises(ValueError, match=r"sts-train\.csv:1: no column 'similarity'"):
        read(folder, "train")
    written(folder, sts=GOOD["sts"][:1])
    with pytest.raises(ValueError, match=r"sts-train\.csv has no example"):
        read(folder, "train")


def test_synthetic_sentences_are_a_function_of_the_seed() -> None:
    assert synthetic(1, 40) == synthetic(1, 40)
    assert synthetic(1, 40)["train"] != synthetic(2, 40)["train"]


def test_synthetic_sentences_are_balanced_and_none_is_in_both_parts() -> None:
    made = synthetic(0, 120)
    for task, classes in zip(TASKS, (5, 2, 6), strict=True):
        train, dev = made["train"][task], made["dev"][task]
        assert (len(train), len(dev)) == (120, 30)
        assert [sum(e.label == k for e in train) for k in range(classes)] == [120 // classes] * classes
        assert [sum(e.label == k for e in dev) for k in range(classes)] == [30 // classes] * classes
        assert len({e.sentences for e in train + dev}) == 150
    with pytest.raises(ValueError, match="n must be from 4 to 4,000, got 3"):
        synthetic(0, 3)


def test_synthetic_similarity_counts_the_things_that_two_sentences_share() -> None:
    function_words = {"there", "is", "the", ",", "and"}
    for example in synthetic(0, 60)["train"]["sts"]:
        a, b = (set(sentence.split()) - function_words for sentence in example.sentences)
        assert len(a) == len(b) == 5
        assert len(a & b) == example.label


@pytest.mark.parametrize(("task", "least"), [("sst", 0.99), ("para", 0.65), ("sts", 0.4)])
def test_synthetic_labels_can_be_learned_from_the_words(task: str, least: float) -> None:
    """A linear model on the words learns the sentiment, and half of what can be known of pairs.

    80 % of the pairs are on the half of the topics that fits their label, and the words reveal the topics. Chance
    level is 50 %, and a Pearson of 0.
    """
    made = synthetic(0, 1000)
    vocabulary = sorted({word for e in made["train"][task] for s in e.sentences for word in s.split()})

    def seen(examples: list[Example]) -> tuple[Tensor, Tensor]:
        each = [[float(word in s.split()) for s in e.sentences for word in vocabulary] for e in examples]
        return torch.tensor(each), torch.tensor([int(e.label) for e in examples])

    x, y = seen(made["train"][task])
    x_dev, y_dev = seen(made["dev"][task])
    wanted = nn.functional.one_hot(y).double() if task != "sts" else y.double()[:, None]
    ridge = x.double().T @ x.double() + torch.eye(x.shape[1])
    found = x_dev.double() @ torch.linalg.solve(ridge, x.double().T @ wanted)
    score = pearson(found[:, 0], y_dev) if task == "sts" else float((found.argmax(1) == y_dev).double().mean())
    assert score >= least


def texts(examples: Examples, task: str, sentence: int) -> list[str]:
    return [e.sentences[sentence] for e in examples[task]]


def test_a_batch_is_its_sentences_tokenized_together() -> None:
    examples: Examples = {  # the k-th sentence has 1 + 7 k mod 5 words
        task: [Example("", tuple("ab " * (1 + 7 * k % 5) for k in range(n, n + pair)), float(n % 2)) for n in range(20)]
        for task, pair in zip(TASKS, (1, 2, 2), strict=True)
    }
    for task, loader, size in zip(TASKS, loaders(examples, encode, (3, 2, 1), None, CPU), (3, 2, 1), strict=True):
        start = 0
        for batch in loader:
            of_batch = slice(start, start + size)
            assert len(batch.tokens) == len(examples[task][0].sentences)
            for k, tokens in enumerate(batch.tokens):
                alone = encode(texts(examples, task, k)[of_batch])
                assert torch.equal(tokens.ids, alone.ids)
                assert torch.equal(tokens.mask, alone.mask)
            assert batch.labels.tolist() == [e.label for e in examples[task][of_batch]]
            assert batch.labels.dtype == (torch.int64 if task == "sst" else torch.float32)
            start += size
        assert start >= 20


def test_each_sentence_is_tokenized_once() -> None:
    seen: list[str] = []

    def counting(sentences: list[str]) -> Tokens:
        seen.extend(sentences)
        return encode(sentences)

    examples = synthetic(0, 20)["train"]
    made = loaders(examples, counting, (4, 4, 4), 0, CPU)
    for loader in (*made, *made):
        list(loader)
    assert sorted(seen) == sorted(s for of_task in examples.values() for e in of_task for s in e.sentences)


def order(made: list[torch.utils.data.DataLoader[Batch]]) -> list[list[int]]:
    """Return the labels, which number the examples, in a pass through each loader."""
    return [[int(label) for batch in loader for label in batch.labels] for loader in made]


def numbered(n: int) -> Examples:
    return {task: [Example(str(k), ("a b",), float(k)) for k in range(n)] for task in TASKS}


def test_the_order_is_a_function_of_the_seed_and_another_in_each_pass() -> None:
    made = loaders(numbered(30), encode, (4, 7, 30), 5, CPU)
    first, second = order(made), order(made)
    assert first == order(loaders(numbered(30), encode, (4, 7, 30), 5, CPU))
    different = {tuple(o) for o in first + second + order(loaders(numbered(30), encode, (4, 7, 30), 6, CPU))}
    assert len(different) == 9  # over tasks, passes and seeds; two are equal by chance once in 30!
    assert all(sorted(o) == list(range(30)) for o in different)
    assert order(loaders(numbered(30), encode, (4, 7, 30), None, CPU)) == [list(range(30))] * 3


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_leave_the_default_generator_alone(seed: int | None) -> None:
    before = torch.get_rng_state()
    order(loaders(numbered(9), encode, (2, 2, 2), seed, CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scheme", ["joint", "annealed"])
def test_a_sampler_over_new_loaders_resumes_with_the_same_batches(scheme: str) -> None:
    def sampler() -> TaskSampler:
        return TaskSampler(loaders(numbered(11), encode, (2, 3, 4), 0, CPU), scheme, epochs=3, seed=0)

    def labels(s: TaskSampler) -> list[list[list[float] | None]]:
        return [[b and b.labels.tolist() for b in batches] for _ in range(s.epoch, 3) for batches in s]

    whole = labels(sampler())
    for stop in (1, 4, 9):
        cut = sampler()
        while cut.epoch * len(cut) + cut.step < stop:
            for _ in cut:
                if cut.epoch * len(cut) + cut.step == stop:
                    break
        resumed = sampler()
        resumed.load_state_dict(cut.state_dict())
        assert labels(resumed) == whole[stop:]


def test_the_number_of_batch_sizes_is_checked() -> None:
    with pytest.raises(ValueError, match=r"batch_sizes must be 3 numbers.*got \(8, 20\)"):
        loaders(numbered(3), encode, (8, 20), 0, CPU)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.data())
def test_classification_measures_are_those_of_scikit_learn(classes: int, data: st.DataObject) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    sklearn_dummy = pytest.importorskip("sklearn.dummy")
    each = st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=12)
    labels, predicted = zip(*data.draw(each), strict=True)
    always = sklearn_dummy.DummyClassifier(strategy="most_frequent").fit(labels, labels)
    found = classification_measures(torch.tensor(predicted), torch.tensor(labels), classes)
    wanted = {
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "precision": sklearn.precision_score(labels, predicted, average="macro", zero_division=0),
        "recall": sklearn.recall_score(labels, predicted, average="macro", zero_division=0),
        "majority": always.score(labels, labels),
    }
    assert found == pytest.approx(wanted, rel=1e-12)  # a few roundings of float64


def test_pearson_is_that_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 100):
        x, noise = torch.randn(2, n, generator=generator)
        for scale in (1e-6, 1.0, 1e6):
            y = scale * (x + noise) + 3
            # Both get the same float32 numbers and differ by roundings of float64, which are larger if the mean is a
            # million times the spread.
            assert pearson(x, y) == pytest.approx(numpy.corrcoef(x.double(), y.double())[0, 1], abs=1e-9)
    assert pearson(x, x) == pytest.approx(1, abs=1e-12)
    assert pearson(x, -x) == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize(
    "useless", [torch.full((7,), 0.1, dtype=torch.float64), torch.tensor([1.0, 2, math.nan, 3, 4, 5, 6])]
)
def test_pearson_is_zero_where_it_is_undefined(useless: Tensor) -> None:
    assert pearson(useless, torch.arange(7)) == 0
    assert pearson(torch.arange(7), useless) == 0
    assert pearson(useless, useless) == 0


def test_overall_scores_are_the_reports() -> None:
    found = Scores(0.5, 0.8, 0.6)
    assert found.average == pytest.approx((0.5 + 0.8 + 0.6) / 3, rel=1e-15)
    assert found.overall == pytest.approx((0.5 + 0.8 + 0.8) / 3, rel=1e-15)  # (0.6 + 1) / 2 is 0.8


class Parrot(nn.Module):
    """A fake model that predicts the first token of each first sentence; its loss is the mean of the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.trained, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)
        self.train()
        self.frozen.eval()

    def forward(self, task: int, batch: Batch) -> Tensor:
        assert not self.training
        assert not self.trained.training
        assert not torch.is_grad_enabled()
        return self.trained(batch.tokens[0].ids[:, 0].float() * self.scale)

    def prediction(self, task: int, output: Tensor) -> Tensor:
        return output if TASKS[task] == "sts" else output.long()

    def output_loss(self, task: int, output: Tensor, labels: Tensor) -> Tensor:
        return self.scale * labels.float().mean()


def test_evaluation_goes_over_all_examples_and_restores_modes() -> None:
    # Parrot predicts the first word's length.
    examples = {
        "sst": [Example("", ("aa b",), 2.0), Example("", ("a b",), 4.0), Example("", ("aaaa",), 4.0)],
        "para": [Example("", ("a b", "c"), 1.0), Example("", ("a", "c d"), 0.0), Example("", ("a", "b"), 1.0)],
        "sts": [Example("", ("a b", "c"), 5.0), Example("", ("aa", "c"), 4.0), Example("", ("aaa", "c"), 3.0)],
    }
    model = Parrot()
    found = evaluate(model, loaders(examples, encode, (2, 2, 2), None, CPU))
    assert model.training
    assert model.trained.training
    assert not model.frozen.training
    # sst: right, wrong, right; 1 is predicted but never right. para: 1 is predicted for all. The means are over 3
    # examples, not over the batches of 2 and 1.
    sst = {"accuracy": 2 / 3, "precision": 2 / 3, "recall": 1.5 / 3, "majority": 2 / 3, "loss": 10 / 3}
    assert found["sst"] == pytest.approx(sst)
    para = {"accuracy": 2 / 3, "precision": 1 / 3, "recall": 1 / 2, "majority": 2 / 3, "loss": 2 / 3}
    assert found["para"] == pytest.approx(para)
    assert found["sts"] == pytest.approx({"pearson": -1.0, "loss": 4.0})
    assert scores(found) == Scores(found["sst"]["accuracy"], found["para"]["accuracy"], found["sts"]["pearson"])


def test_modes_are_restored_after_an_error() -> None:
    model = Parrot()
    with pytest.raises(IndexError):
        evaluate(model, loaders(numbered(3), encode, (2, 2, 2), None, CPU)[:1])
    assert model.training
    assert not model.frozen.training
