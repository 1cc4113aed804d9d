"""An encoder under T tasks, and the ways to take a step of it on one of several ranks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk

PLAIN, SURGERY, CUT, ONE_PASS, T_PASSES = "DDP, Σ L", "surgery", "surgery, AdamW cut", "one pass", "T passes"


class Size(NamedTuple):
    """The size of an encoder, and of each rank's batch. The default is that of MiniLM's six layers."""

    layers: int = 6
    width: int = 384
    heads: int = 12
    words: int = 30_522
    batch: int = 16
    length: int = 64
    T: int = 3


class Encoder(nn.Module):
    """Word embeddings, a transformer's encoder, and a linear head for each task.

    Args:
        size: its size.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(size.words, size.width)
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(size.width, 2) for _ in range(size.T))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the losses of all tasks."""
        h = self.encoder(self.words(x)).mean(1)
        return [nn.functional.cross_entropy(head(h), target) for head, target in zip(self.heads, y, strict=True)]


class Steps:
    """The ways to take a step.

    Args:
        size: the size of the model.
        rank: the number of this rank, from which its batch follows.

    Attributes:
        shared: the number of elements of the parameters under surgery.
        own: the number of elements of the heads.
        reduced: the number of elements that DistributedDataParallel has reduced.
    """

    def __init__(self, size: Size, rank: int) -> None:
        torch.manual_seed(0)
        self.model = Encoder(size)
        self.own = sum(p.numel() for p in self.model.heads.parameters())
        self.shared = sum(p.numel() for p in self.model.parameters()) - self.own
        self.reduced = 0
        self._ddp = DistributedDataParallel(self.model)
        self._ddp.register_comm_hook(None, self._counting)
        self._adamw = torch.optim.AdamW(self.model.parameters(), fused=True)
        self._surgery = gk.SurgeryOptimizer(self._adamw, gk.PCGrad())
        self._cut = gk.SurgeryOptimizer(gk.optim.AdamW(self.model.parameters()), gk.PCGrad(), shard_optimizer=True)
        torch.manual_seed(rank)
        self._x = torch.randint(size.words, (size.batch, size.length))
        self._y = torch.randint(2, (size.T, size.batch))

    def of(self, name: str) -> Callable[[], None]:
        """Return a way to take a step, or a part of one, by its name."""
        ways = {PLAIN: self._plain, SURGERY: self._by_surgery, CUT: self._by_rows}
        return (ways | {ONE_PASS: self._one_pass, T_PASSES: self._t_passes})[name]

    def _plain(self) -> None:
        self._adamw.zero_grad()
        torch.stack(self._ddp(self._x, self._y)).sum().backward()
        self._adamw.step()

    def _by_surgery(self) -> None:
        self._adamw.zero_grad()
        self._surgery.backward(self.model(self._x, self._y))
        self._surgery.step()

    def _by_rows(self) -> None:
        self._adamw.zero_grad()
        self._cut.update(self.model(self._x, self._y))

    def _one_pass(self) -> None:
        torch.autograd.grad(torch.stack(self.model(self._x, self._y)).sum(), list(self.model.parameters()))

    def _t_passes(self) -> None:
        losses, params = self.model(self._x, self._y), list(self.model.parameters())
        for loss in losses:
            torch.autograd.grad(loss, params, retain_graph=loss is not losses[-1], allow_unused=True)

    def _counting(self, _: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket as DistributedDataParallel does by itself, and count it."""
        self.reduced += bucket.buffer().numel()
        mean = bucket.buffer().div_(torch.distributed.get_world_size())
        work = torch.distributed.all_reduce(mean, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
