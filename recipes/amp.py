"""Mixed precision: float16 autocast and a GradScaler, on a GPU or a CPU.

All tasks have the same scale, so surgery sees the same angles and finds the same weights as without scaling. There is
one ``.grad`` for any number of tasks, and it is unscaled once. If one task's gradient overflows, the combination is not
finite and the scaler skips the step. Parameters and optimizer state then stay unchanged. GradVac's targets also stay
unchanged, if the overflow is in the gradient of shared parameters.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk


def build(device: str) -> tuple[Model, gk.SurgeryOptimizer, torch.amp.GradScaler]:
    """Return the model, the optimizer and the scaler."""
    torch.manual_seed(0)
    model = Model().to(device)
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.GradVac())
    return model, opt, torch.amp.GradScaler(device)


def train_step(
    model: Model, opt: gk.SurgeryOptimizer, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor
) -> gk.SurgeryInfo:
    """Take one step; its info holds the losses and dot products of the scaled losses."""
    opt.zero_grad()
    with torch.autocast(x.device.type, torch.float16):
        losses = task_losses(model(x), y)
    info = opt.backward([scaler.scale(loss) for loss in losses])
    scaler.unscale_(opt)  # once, not once per task
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    return info


def main() -> None:
    """Train for fifty steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, opt, scaler = build(device)
    for x, y in batches(50, device):
        scale = scaler.get_scale()  # the scale of this step, because update may change it
        info = train_step(model, opt, scaler, x, y)
    print(f"losses {(info.losses / scale).tolist()} after 50 steps in float16 on {device}, scaled by {scale:.0f}")


if __name__ == "__main__":
    main()
