"""What the README says that can be checked without installing anything."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [("python -m bench", "bench.report", "summary"), ("python -m bench.step", "bench.step.table", "table")],
)
def test_a_table_is_that_of_the_raw_results(command: str, module: str, function: str) -> None:
    report = getattr(pytest.importorskip(module, reason="bench/ is in the checkout only"), function)
    line = next(line for line in README.splitlines() if line.startswith(f"<!-- {command} --show "))
    assert report(json.loads((ROOT / line.split()[-2]).read_text())) in README


@contextmanager
def without_a_gpu(names: dict[str, Any]) -> Iterator[None]:
    """Streams and graphs that are none, where there is no GPU: a replay is a call of ``step``."""
    import torch

    graph = SimpleNamespace(replay=lambda: names["step"]())
    stand_ins = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "CUDAGraph": lambda: graph,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield


def test_its_examples_run() -> None:
    """Every Python block, one after another, on a small model; names the prose leaves open are given here."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)

    def losses() -> list[torch.Tensor]:
        return list(model(torch.ones(2, 4)).square().mean(0))

    def loss(t: int, batch: list[torch.Tensor]) -> torch.Tensor:
        return model(batch[0])[:, t].square().mean()

    names: dict[str, object] = {
        "torch": torch,
        "model": model,
        "loss": loss,
        "J": torch.randn(3, 10),
        "offsets": torch.tensor([0, 10]),
    }
    names |= dict(zip(("loss_a", "loss_b", "loss_c"), losses(), strict=True))
    x, y = torch.ones(2, 4), torch.zeros(2, 3)
    names |= {"x": x, "y": y, "loader": [(torch.randn(2, 4), torch.ones(2, 3))] * 2}
    names["task_losses"] = lambda model, x, y: list((model(x) - y).square().mean(0))
    for name, n in (("loader_a", 5), ("loader_b", 3), ("loader_c", 1)):
        names[name] = DataLoader(TensorDataset(torch.randn(n, 4)))
    blocks = [part.split("```")[0] for part in README.split("```python\n")[1:]]
    assert len(blocks) == 8
    for block in blocks:
        names["losses"] = losses()
        with without_a_gpu(names) if "cuda" in block else nullcontext():
            before = model.weight.detach().clone()
            exec(block, names)
            assert "cuda" not in block or not torch.equal(before, model.weight)
    assert torch.equal(y, torch.ones(2, 3))
    assert model.weight.grad is not None
    assert names["sampler"].epoch == 10
    assert names["Strongest"]().weights(names["M"]).sum() == 1
