"""Steps through activations over each kind of layer of torch.nn, compared with whole rows."""

import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

import gradkern as gk
from gradkern.gradients.activations.layers import layers_of
from gradkern.gradients.activations.trace import Trace
from tests.step.activations.kinds import CASES, NO_CASE, Case
from tests.step.activations.truth import FINISHES, NEAR, Mixed, check_grads, check_step, truth
from tests.tolerances import assert_near

T = 3

N = 3
"""Examples in a batch."""

pytestmark = pytest.mark.usefixtures("float64_by_default", "way")
each_case = pytest.mark.parametrize("name", CASES)


class Net(nn.Module):
    """A linear layer, the case's layer, and a head for each task on the last dimension of what comes out."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.x = case.given(N)
        width = self.x.shape[-1]
        self.stem = nn.Linear(width, width) if self.x.is_floating_point() else nn.Identity()
        self.layer, self.call = case.make(), case.call
        width = self.features().shape[-1]  # makes lazy parameters, too
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(T))

    def features(self) -> Tensor:
        h = self.stem(self.x)
        return torch.tanh(self.call(self.layer, torch.tanh(h) if h.is_floating_point() else h))

    def losses(self) -> list[Tensor]:
        h = self.features()
        return [(head(h) - t).square().mean() for t, head in enumerate(self.heads)]


@pytest.mark.parametrize("finish", FINISHES)
@each_case
def test_a_step_is_that_of_whole_rows(name: str, finish: str) -> None:
    model = Net(CASES[name])
    check_step(model.losses(), list(model.parameters()), finish)


@each_case
def test_each_parameter_has_a_gramian_of_its_own(name: str) -> None:
    """That of a parameter with small gradients would not show in the whole model's."""
    model = Net(CASES[name])
    trunk = [(name, p) for name, p in model.named_parameters() if not name.startswith("heads")]
    losses = model.losses()
    of_each = [truth(losses, [p], Mixed().weights) for _, p in trunk]
    of_all = truth(losses, [p for _, p in trunk], Mixed().weights)
    info = gk.backward(losses, trunk, aggregator=Mixed(), groups="parameter", through="activations", finish="kept")
    assert info.groups == tuple(name for name, _ in trunk)
    for (_, p), M, expected in zip(trunk, info.gramian, of_each, strict=True):
        # A bias below a batch norm has a gradient of 0, of which rounding errors of the largest remain.
        size = max(expected.gramian.diagonal().max(), NEAR * of_all.gramian.diagonal().max())
        assert_near(M, expected.gramian, size, NEAR)
        check_grads([p], replace(expected, scale=max(expected.scale, of_all.scale)))


KINDS_WITH_ROWS = {
    "Bilinear",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "EmbeddingBag",
    "LazyConvTranspose1d",
    "LinearCrossEntropyLoss",
}
CASES_WITH_ROWS = {
    "Conv2d of weight_norm",
    "Embedding scaled by frequency",
    "Embedding, sparse",
    "LayerNorm of two dimensions",
    "Linear of orthogonal",
    "Linear of spectral_norm",
    "Linear of weight_norm",
    "MultiheadAttention of a key more",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
}
"""The layers of which a matrix has rows; cross-attention cuts its weight. The README names them."""


@each_case
def test_which_layers_have_rows(name: str) -> None:
    model = Net(CASES[name])
    trace = Trace(dict(enumerate(model.losses())))
    matrices = [p for p in model.layer.parameters() if p.ndim > 1 and p in trace.leaves]
    has_rows = any(not layers_of(trace, p) for p in matrices)
    assert has_rows == (CASES[name].kind in KINDS_WITH_ROWS or name in CASES_WITH_ROWS)


def may_have_weights(kind: type[nn.Module]) -> bool:
    """Return whether a layer has parameters, or cannot be made from twos alone."""
    options = inspect.signature(kind.__init__).parameters
    needed = [p.name for p in list(options.values())[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    switches = {"affine", "elementwise_affine"} & options.keys()
    try:
        with warnings.catch_warnings(action="ignore"):
            layer = kind(**dict.fromkeys(needed, 2), **dict.fromkeys(switches, True))
    except (TypeError, ValueError):
        return True
    return any(True for _ in layer.parameters())


def test_each_kind_of_layer_has_a_case() -> None:
    kinds = {name: kind for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    found = {name for name, kind in kinds.items() if may_have_weights(kind)}
    assert {"Linear", "LSTM", "PReLU", "InstanceNorm2d"} <= found
    with_case = {case.kind for case in CASES.values()}
    lazy = {name for name in found if issubclass(kinds[name], LazyModuleMixin)}  # each becomes a kind without "Lazy"
    assert {name.removeprefix("Lazy") for name in lazy} <= with_case
    missing = found - with_case - lazy - NO_CASE.keys()
    assert not missing, f"add a case, or a reason against it, to kinds.py for {sorted(missing)}"
    assert with_case <= found
    assert NO_CASE.keys() <= found
