"""Sketches of mean gradients on several ranks, by closed forms."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import gradkern as gk
from tests.distributed.jobs import T, mesh_of, whole
from tests.distributed.pool import Pool
from tests.distributed.sentences import COLUMNS, PLAIN, Words, words

FINISH = ["backward", "kept"]


def rows() -> list[Tensor]:
    """Return the gradients of what tasks share, (T, q, p) of matrices whose p columns are sketched, by torch."""
    model, *batch = words(0, 1)
    shared = [model.words.weight, model.layer.weight, model.scale]
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in model.losses(*batch, PLAIN)]
    of_words, of_layer, of_scale = map(torch.stack, zip(*grads, strict=True))
    return [of_words.transpose(1, 2), of_layer, of_scale.unsqueeze(-1)]


def sketched(
    rank: int, group: Any, ranks: int, finish: str, seeds: Sequence[int], is_sharded: bool = False
) -> list[Tensor]:
    """Return the Gramian of a step with each seed, the last weights, and the last gradients."""
    model, *batch = words(rank, ranks)
    if is_sharded:
        fully_shard(model, mesh=mesh_of(group, ranks, ""))
        register_fsdp_forward_method(model, "losses")
    params = list(model.parameters())
    found = []
    for seed in seeds:
        for p in params:
            p.grad = None
        way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": gk.Sketch(COLUMNS, seed)}
        losses = model.losses(*batch, PLAIN)
        info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
        assert info.gramian is not None
        assert info.weights is not None
        found.append(info.gramian)
    return [*found, info.weights, *(whole(p.grad) for p in params if p.grad is not None)]


@pytest.mark.parametrize(("finish", "is_sharded"), [("backward", False), ("kept", False), ("backward", True)])
def test_a_sketch_is_that_of_the_mean_gradients(pool: Pool, finish: str, is_sharded: bool) -> None:
    """The signs are those of seed, step and parameter, an embedding's too. All ranks have the same bits."""
    places = {name: k for k, (name, _) in enumerate(Words().named_parameters())}
    of_words, of_layer, of_scale = rows()
    X = [of_scale]
    for name, G in (("words.weight", of_words), ("layer.weight", of_layer)):
        X.append(G @ gk.Sketch(COLUMNS, 5).signs(places[name], G.shape[2], torch.float64, torch.device("cpu")))
    M = sum(x.flatten(1) @ x.flatten(1).T for x in X)
    of_ranks = pool.run(sketched, 4, finish, [5], is_sharded, ranks=4)
    for found in of_ranks:
        assert all(torch.equal(x, first) for x, first in zip(found, of_ranks[0], strict=True))
        torch.testing.assert_close(found[0], M, rtol=1e-12, atol=1e-12)  # sums of some hundred numbers below 1
    _, w, *grads = of_ranks[0]
    for k, G in ((places["words.weight"], of_words.transpose(1, 2)), (places["layer.weight"], of_layer)):
        torch.testing.assert_close(grads[k], torch.einsum("t,tqp->qp", w, G), rtol=1e-12, atol=1e-12)


def reported(rank: int, group: Any, ranks: int, finish: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the Gramian of a sketch that reports its error, and the report."""
    model, *batch = words(rank, ranks)
    way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": gk.Sketch(1, 3, report=True)}
    info = gk.backward(model.losses(*batch, PLAIN), model, aggregator=gk.MGDA(), process_group=group, **way)
    return info.gramian, info.conflict_agreement


@pytest.mark.parametrize("finish", FINISH)
def test_a_report(pool: Pool, finish: str) -> None:
    """It compares with the Gramian of the mean gradients."""
    M = sum(G.flatten(1) @ G.flatten(1).T for G in rows())
    for found, agreement in pool.run(reported, 2, finish, ranks=2):
        agree = [(found[i, j] < 0) == (M[i, j] < 0) for i in range(T) for j in range(i)]
        torch.testing.assert_close(agreement, sum(agree) / 3)
        assert sum(agree) == 1  # by these signs


def test_a_sketch_is_unbiased(pool: Pool) -> None:
    """Its mean over 200 seeds is near, by the variance that the docstring of Sketch states, and so is the variance."""
    found = torch.stack(pool.run(sketched, 2, "backward", range(200), ranks=2)[0][:200])
    of_words, of_layer, of_scale = rows()
    M = sum(G.flatten(1) @ G.flatten(1).T for G in (of_words, of_layer, of_scale))
    lengths = [G.flatten(1).square().sum(1) for G in (of_words, of_layer)]
    variance = sum(2 * n.unsqueeze(1) * n / COLUMNS for n in lengths)
    assert ((found.mean(0) - M).abs() < 4 * (variance / 200).sqrt()).all()  # four standard errors
    assert (found.var(0) < 1.5 * variance).all()  # a variance of 200 numbers is off by a tenth, or a fifth in the tail
    assert (found.var(0).diagonal() > variance.diagonal() / 3).all()
