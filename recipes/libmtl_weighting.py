"""LibMTL: a weighting on gradkern.

LibMTL mixes a weighting and an architecture into one model, calls ``model.backward(losses)`` and steps. A weighting
therefore only needs a ``backward`` that fills ``.grad``. To use another method, set another ``aggregator``. LibMTL
finds weightings by name as attributes of ``LibMTL.weighting``; you can add your own class there.
"""

from typing import Any

import torch
from LibMTL.architecture import HPS
from LibMTL.weighting.abstract_weighting import AbsWeighting
from torch import Tensor, nn

import gradkern as gk


class PCGrad(AbsWeighting):
    """Replacement for ``LibMTL.weighting.PCGrad``: ``Trainer(weighting=PCGrad, rep_grad=False, ...)``."""

    def init_param(self) -> None:
        """Make the aggregator, which has a state. LibMTL calls this once, after it has made the model."""
        self.aggregator = gk.PCGrad()

    def backward(self, losses: Tensor, **kwargs: Any) -> None:
        """Fill ``.grad`` from the losses (T,) of all tasks."""
        if self.rep_grad:
            raise ValueError("rep_grad must be False: the losses do not reach the encoder otherwise")
        # LibMTL writes all losses into one tensor, so autograd returns zeros from each task for the other tasks'
        # decoders. Without shared=, the decoders would count as shared.
        gk.backward(list(losses), self, aggregator=self.aggregator, shared=self.get_share_params())


class MTLModel(HPS, PCGrad):
    """The class that LibMTL's ``Trainer`` makes from an architecture and a weighting."""


def main() -> None:
    """Train three tasks as LibMTL's ``Trainer`` does, and print the losses before and after."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    targets = {"a": a, "b": b, "c": -a}
    decoders = nn.ModuleDict({task: nn.Linear(16, 1) for task in targets})
    model = MTLModel(
        task_name=list(targets),
        encoder_class=lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh()),
        decoders=decoders,
        rep_grad=False,
        multi_input=False,
        device=torch.device("cpu"),
    )
    model.init_param()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(100):
        predictions = model(x)
        losses = torch.zeros(3)
        for t, (task, y) in enumerate(targets.items()):
            losses[t] = (predictions[task].squeeze(-1) - y).square().mean()
        opt.zero_grad()
        model.backward(losses)
        opt.step()
        history.append(losses.detach())
    print("losses " + ", ".join(f"{b:.2f} -> {a:.2f}" for b, a in zip(history[0], history[-1], strict=True)))


if __name__ == "__main__":
    main()
