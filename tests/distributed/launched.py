"""What torchrun starts: a recipe's training on each rank with its part of each batch, in one process with all of it.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.launched FOLDER NAME...`` writes each rank's
parameters to files in the folder. Without torchrun there is one process.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import gradkern as gk
from tests.distributed.jobs import whole

ROOT = Path(__file__).parents[2]
BATCH = 16


def recipe(name: str) -> Any:
    """Import a recipe as a script beside it would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        return importlib.import_module(name)


def plain(ranks: int, wrapper: str) -> nn.Module:
    r = recipe("several_ranks")
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        r.DistributedSampler = partial(r.DistributedSampler, shuffle=False)
    return r.train(1, wrapper if ranks > 1 else "none")[0]


def accelerate(ranks: int) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    r = recipe("accelerate_loop")
    torch.manual_seed(0)
    parts = DataLoaderConfiguration(split_batches=True)  # the loader's batches are those of all ranks
    accelerator = Accelerator(cpu=True, dataloader_config=parts)
    return accelerator.unwrap_model(r.train(accelerator, r.data(), epochs=4))


def lightning(ranks: int) -> nn.Module:
    import lightning as L

    r = recipe("lightning_module")
    torch.manual_seed(0)
    model, dataset = r.MultiTask(), r.data()
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {"devices": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", precision="64-true", **strategy, **quiet)
    sampler = DistributedSampler(dataset, ranks, int(os.environ.get("RANK", 0)), shuffle=False)
    trainer.fit(model, DataLoader(dataset, BATCH // ranks, sampler=sampler))
    return model


def trainer(ranks: int) -> nn.Module:
    from transformers import TrainingArguments

    r = recipe("hf_trainer")
    torch.manual_seed(0)
    model, dataset = r.MultiTask(), r.data(64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    size = {"per_device_train_batch_size": BATCH // ranks, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    backend = {"ddp_backend": "gloo"} if ranks > 1 else {}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, learning_rate=0.01, use_cpu=True, **size, **quiet, **backend
        )
        r.SurgeryTrainer(model, arguments, train_dataset=dataset).train()
    return model


RECIPES: dict[str, Callable[[int], nn.Module]] = {
    "plain": partial(plain, wrapper="none"),
    "ddp": partial(plain, wrapper="ddp"),
    "fsdp": partial(plain, wrapper="fsdp"),
    "accelerate": accelerate,
    "lightning": lightning,
    "trainer": trainer,
}


def main() -> None:
    """Train models in float64, by PCGrad in the order of tasks, and write their parameters."""
    folder, *names = sys.argv[1:]
    rank, ranks = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    gk.PCGrad = partial(gk.PCGrad, order=range(3))  # type: ignore[misc]
    for name in names:
        params = [whole(p.detach()) for p in RECIPES[name](ranks).parameters()]
        torch.save(params, Path(folder) / f"{name}, {rank} of {ranks}.pt")
    if dist.is_initialized():
        dist.barrier()  # no rank ends while another one is still in a collective
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # a thread of Gloo that asks for the interpreter while that ends would abort the process


if __name__ == "__main__":
    main()
