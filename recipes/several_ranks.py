"""Several ranks: each takes steps with its part of every batch, and the step is that of one process with all of it.

Run ``torchrun --nproc-per-node 2 recipes/several_ranks.py``, or as an ordinary script for one process. The loop is the
same. ``DistributedDataParallel`` is not needed: the step itself averages the gradients of each task. If the model is in
it already, as frameworks put it, the step bypasses it. With ``--wrapper fsdp`` behind the script's name each rank holds
a part of every parameter.
"""

import argparse
import os

import torch
import torch.distributed as dist
from tasks import Model, batches, task_losses
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradkern as gk

BATCH = 32


def data() -> TensorDataset:
    """Return 512 inputs with the targets of three tasks."""
    x, y = (torch.cat(parts) for parts in zip(*((x, y.T) for x, y in batches(16)), strict=True))
    return TensorDataset(x.to(torch.get_default_dtype()), y.to(torch.get_default_dtype()))


def train(epochs: int, wrapper: str = "none") -> tuple[nn.Module, Tensor]:
    """Train on the ranks there are, and return the model and the last losses, which are means over the ranks.

    Args:
        epochs: the number of epochs.
        wrapper: "ddp" for ``DistributedDataParallel``, "fsdp" for ``fully_shard``, or "none".
    """
    R = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)  # the same model on all ranks
    model = Model()
    if wrapper == "fsdp":
        fully_shard(model.trunk)  # its weights are gathered while it runs, those of the heads while the model does
        fully_shard(model)  # the parameters are DTensors from here on, so the optimizer is made after it
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad())
    dataset = data()
    sampler = DistributedSampler(dataset) if R > 1 else None  # another part for each rank
    loader = DataLoader(dataset, BATCH // R, sampler=sampler)
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for x, y in loader:
            opt.zero_grad()
            info = opt.backward(task_losses(wrapped(x), y.T))
            opt.step()
    return model, info.losses


def main() -> None:
    """Train for five epochs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--wrapper", choices=["none", "ddp", "fsdp"], default="none")
    wrapper = parser.parse_args().wrapper
    is_launched = "RANK" in os.environ  # torchrun sets it
    if is_launched:
        dist.init_process_group()  # for tensors on GPUs by NCCL, for those on the CPU by Gloo
    _, losses = train(5, wrapper if is_launched else "none")
    if not is_launched or dist.get_rank() == 0:
        print(f"losses {losses.tolist()} after 80 steps of {dist.get_world_size() if is_launched else 1} rank(s)")
    if is_launched:
        dist.barrier()  # no rank ends while another one is still in a collective
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
