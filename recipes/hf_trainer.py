"""Hugging Face Transformers: a ``Trainer`` with gradient surgery.

``create_optimizer`` wraps the optimizer that the arguments select in a ``SurgeryOptimizer``, and ``training_step``
passes it the losses of all tasks. All batches of ``gradient_accumulation_steps`` share one surgery. The Trainer does
clipping, mixed precision, the scheduler and checkpoints as usual; checkpoints include the state of the surgery.
``torchrun`` starts several processes, each with batches of its own.
"""

import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PrinterCallback, Trainer, TrainingArguments

import gradkern as gk


class SurgeryTrainer(Trainer):
    """Trainer for models whose forward pass returns a dict with all tasks' ``losses``, and their sum as ``loss``."""

    accumulating: ExitStack | None = None  # open from the first batch of a step to the last

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Wrap the Trainer's optimizer in the surgery, once."""
        self.accumulating = None  # an earlier training run may have been interrupted within a step
        if self.optimizer is None:
            self.optimizer = gk.SurgeryOptimizer(super().create_optimizer(model), gk.PCGrad())
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Do the Trainer's step, with a backward pass per task instead of ``accelerator.backward``."""
        surgery = self.optimizer.optimizer  # self.optimizer is Accelerate's wrapper
        if self.accumulating is None:
            self.accumulating = ExitStack()
            self.accumulating.enter_context(surgery.accumulate())
        model.train()
        with self.compute_loss_context_manager():
            losses = model(**self._prepare_inputs(inputs))["losses"]
        losses = [loss / self.current_gradient_accumulation_steps for loss in losses]
        total = sum(losses).detach()
        if self.accelerator.scaler is not None:  # fp16=True
            losses = self.accelerator.scaler.scale(losses)
        surgery.backward(losses)
        if self.accelerator.sync_gradients:
            self.accumulating.close()
            self.accumulating = None
        return total


class MultiTask(nn.Module):
    """A small BERT with three heads; task t is to count token t."""

    def __init__(self) -> None:
        super().__init__()
        size = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
        self.bert = BertModel(BertConfig(**size, num_hidden_layers=1, num_attention_heads=2))
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the losses, from token ids (n, 8) and counts (n, 3)."""
        h = self.bert(input_ids).pooler_output
        losses = [(head(h).squeeze(-1) - y).square().mean() for head, y in zip(self.heads, labels.T, strict=True)]
        return {"loss": sum(losses), "losses": losses}


def data(n: int) -> list[dict[str, Tensor]]:
    """Return ``n`` random sentences of 8 tokens, with their counts of tokens 0, 1 and 2."""
    tokens = torch.randint(0, 12, (n, 8))
    counts = torch.stack([(tokens == t).sum(1) for t in range(3)], 1).float()
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(tokens, counts, strict=True)]


def main() -> None:
    """Train for three epochs, and print the loss before and after."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        size = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
        arguments = TrainingArguments(folder, num_train_epochs=3, learning_rate=1e-3, use_cpu=True, **size, **quiet)
        trainer = SurgeryTrainer(MultiTask(), arguments, train_dataset=data(256), eval_dataset=data(64))
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        if trainer.is_world_process_zero():
            print(f"{trainer.state.global_step} steps, held-out loss {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
