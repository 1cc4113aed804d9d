"""Tests of the README: its tables match the raw results, its links lead somewhere, and its code runs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.compiler.config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradkern as gk
from gradkern.ops import capture
from gradkern.ops.layout import Tables
from tests import interpreter
from tests.interpreter import serving_the_cpu
from tests.models import MultiHead, problem
from tests.step.test_no_host_reads import RefusesReads

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
Names = dict[str, Any]


@pytest.mark.parametrize(
    ("page", "command", "module", "function"),
    [
        ("README.md", "python -m bench", "bench.report", "summary"),
        ("README.md", "python -m bench.step", "bench.step.table", "table"),
        ("bench/NOTES.md", "python -m bench.step", "bench.step.shared.table", "table"),
    ],
)
def test_a_table_is_that_of_the_raw_results(page: str, command: str, module: str, function: str) -> None:
    report = getattr(pytest.importorskip(module, reason="bench/ is in the checkout only"), function)
    text = (ROOT / page).read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"<!-- {command} --show "))
    assert report(json.loads((ROOT / line.split()[-2]).read_text())) in text


def test_the_table_of_three_tasks_is_that_of_the_raw_results() -> None:
    outcomes = pytest.importorskip("examples.minbert.outcomes", reason="bench/ is in the checkout only")
    line = next(line for line in README.splitlines() if line.startswith("<!-- python -m examples.minbert report "))
    rows = outcomes.rows(outcomes.found([ROOT / line.split()[-2]]))
    assert (
        pytest.importorskip("examples.minbert.report", reason="its plots need matplotlib").side_by_side(rows) in README
    )


def test_its_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    prose = "".join(README.split("```")[::2])
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert len(links) > 20
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).is_file(), link


def sections() -> dict[str, list[str]]:
    """Return the Python blocks under each heading."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^#+ ", README, flags=re.MULTILINE)[1:]:
        blocks = [block.split("```")[0] for block in part.split("```python\n")[1:]]
        if blocks:
            found[part.splitlines()[0]] = blocks
    return found


SECTIONS = sections()


class Model(MultiHead):
    """Model as frameworks need it: its forward pass returns the losses of all tasks."""

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return task_losses(self, x, y)


def task_losses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return one loss per task for inputs (B, 6) and targets (3, B). ``model`` may be compiled."""
    h = model.trunk(x)
    return [nn.functional.mse_loss(head(h).squeeze(-1), target) for head, target in zip(model.heads, y, strict=True)]


def common() -> Names:
    """Return the names that the README's code uses without defining them, the same for every section."""
    _, x, y = problem()
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-3), gk.PCGrad())
    losses = task_losses(model, x, y)
    return {
        "torch": torch,
        "gk": gk,
        "model": model,
        "opt": opt,
        "x": x,
        "y": y,
        "loader": [(x, y), (2 * x, -y)],
        "micro_batches": [(x, y), (2 * x, -y)],
        "losses": losses,
        **dict(zip(("loss_a", "loss_b", "loss_c"), losses, strict=True)),
        "task_losses": task_losses,
    }


@contextmanager
def graphs_without_a_gpu(names: Names) -> Iterator[None]:
    """Replace CUDA's streams and graphs by ones that need no GPU. A replay is a call of ``step``.

    If Triton's interpreter can run, the kernels serve the CPU. A capture then refuses the same as a real one: reading
    the device, and using a table that no earlier step has copied there.
    """
    kernels, refusing = (nullcontext, nullcontext) if interpreter.why_not() else (serving_the_cpu, RefusesReads)
    copied: set[Tables] = set()
    capturing = False

    def copy_once(tables: Tables, *arguments: Any) -> Any:
        copied.add(tables)
        return really_copy(tables, *arguments)

    @contextmanager
    def graph(of: Any) -> Iterator[None]:
        nonlocal capturing
        capturing = True
        with refusing():
            yield
        capturing = False

    stand_ins = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: names["step"]()),
    }
    really_copy = Tables._once
    with pytest.MonkeyPatch.context() as patch, kernels():
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(Tables, "_once", copy_once)
        patch.setattr(Tables, "is_on", lambda tables, device: tables in copied)
        patch.setattr(capture, "capturing", lambda device: capturing)
        yield


def small_micro_batches(names: Names) -> None:
    """Make the micro-batches small, so that no loss overflows in float16 at a scaler's first scale."""
    names["micro_batches"] = [(x / 100, y / 100) for x, y in names["micro_batches"]]


def methods(names: Names) -> None:
    for name, n in (("loader_a", 5), ("loader_b", 3), ("loader_c", 1)):
        names[name] = DataLoader(TensorDataset(torch.randn(n, 6)))
    names["loss"] = lambda t, batch: names["model"].loss(t, batch[0], torch.ones(3, 1))
    names["M"] = gk.gramian(torch.randn(3, 10))


def compiled(names: Names) -> None:
    real = torch.compile
    names["torch"] = SimpleNamespace(**vars(torch) | {"compile": lambda model: real(model, backend="eager")})


def resumed(names: Names) -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(names["opt"])
    sampler = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    names |= {"scheduler": scheduler, "sampler": sampler, "scaler": torch.amp.GradScaler("cpu")}


def accelerated(names: Names) -> None:
    accelerate = pytest.importorskip("accelerate")
    x, y = names["x"], names["y"]
    names["loader"] = DataLoader([(x, y), (2 * x, -y), (x, -y)], batch_size=None)
    names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(names["opt"])
    names["accelerator"] = accelerate.Accelerator(cpu=True)


def on_one_rank(names: Names) -> None:
    """Let nothing be sharded, which needs several processes; tests/distributed trains in this way there."""
    names["fully_shard"], names["FSDPModule"] = lambda model: None, ()
    names["model"].set_reshard_after_backward = lambda value: None


def acting(names: Names) -> None:
    names["actor"], names["critic"] = names["model"], MultiHead()
    names["batches"] = [(names["x"], names["y"]), None, (2 * names["x"], names["y"])]
    names["actor_loss"] = lambda t, batch: names["actor"].loss(t, *batch) + names["log_alphas"][t].exp()


GIVEN: dict[str, Callable[[Names], None]] = {
    "Use it": lambda names: names.update(J=torch.randn(3, 10), offsets=torch.tensor([0, 4, 10])),
    "Methods": methods,
    "PCGrad and GradVac with AMP": small_micro_batches,
    "Mixed precision": lambda names: names.update(scaler=torch.amp.GradScaler("cpu")),
    "torch.compile": compiled,
    "Interrupt and resume": resumed,
    "Logging": lambda names: pytest.importorskip("matplotlib"),
    "TorchJD": lambda names: pytest.importorskip("torchjd"),
    "Hugging Face Accelerate": accelerated,
    "Hugging Face Trainer": lambda names: pytest.importorskip("transformers"),
    "conflictfree": lambda names: pytest.importorskip("conflictfree"),
    "Several ranks": on_one_rank,
    "Multi-task reinforcement learning": acting,
}
"""Functions that add the names a section needs besides the common ones."""


def sampled(names: Names) -> None:
    assert names["sampler"].epoch == 10
    assert names["Strongest"]().weights(names["M"]).sum() == 1


def saved_all(names: Names) -> None:
    assert torch.load("run.pt")["opt"]["surgery"]["method"] == "PCGrad"


def lightning_trains(names: Names) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        training_step = names["training_step"]

        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = names["model"], False

        def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
            return task_losses(self.model, x, y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return names["opt"]

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(Module(), DataLoader([(names["x"], names["y"])], batch_size=None))


def transformers_trains(names: Names) -> None:
    from transformers import TrainingArguments

    class WithLosses(Model):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return {"losses": super().forward(x, y.T)}

    names["model"] = WithLosses()
    names["before"] = [p.detach().clone() for p in names["model"].parameters()]
    rows = [{"x": x, "y": y} for x, y in zip(names["x"], names["y"].T, strict=True)]
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments("unused", max_steps=1, learning_rate=1e-2, **quiet)
    names["SurgeryTrainer"](names["model"], arguments, train_dataset=rows).train()


def libmtl_combines(names: Names) -> None:
    class Network(names["PCGrad"], Model):  # type: ignore[misc]
        def get_share_params(self) -> Iterator[nn.Parameter]:
            return self.trunk.parameters()

    network = Network()
    network.init_param()
    network.backward(torch.stack(task_losses(network, names["x"], names["y"])))
    assert all(p.grad is not None for p in network.parameters())


def conflictfree_agrees(names: Names) -> None:
    theirs = pytest.importorskip("conflictfree.grad_operator").PCGradOperator()
    J = torch.randn(3, 50, dtype=torch.float64)
    expected = theirs.calculate_gradient(J)
    assert (expected - J.sum(0)).abs().max() > 1e-3  # it has projected something
    for given in (J, list(J)):
        assert torch.allclose(names["PCGradOperator"]().calculate_gradient(given), expected, rtol=1e-12, atol=1e-12)


def lowers_the_losses(names: Names) -> None:
    first, last = (sum(task_losses(model, names["x"], names["y"])) for model in (common()["model"], names["model"]))
    assert last < first / 2  # 48 random targets, and many more parameters than these


def absent_temperature_stays(names: Names) -> None:
    assert [log_alpha.item() == 0 for log_alpha in names["log_alphas"]] == [False, True, False]
    assert all(p.requires_grad and p.grad is None for p in names["critic"].parameters())


AFTER: dict[str, Callable[[Names], None]] = {
    "Methods": sampled,
    "Interrupt and resume": saved_all,
    "Gradient accumulation": lambda names: torch.testing.assert_close(
        names["total"].info.cosines.diagonal(), torch.ones(3)
    ),
    "Logging": lambda names: [names[name].savefig("figure.png") for name in ("cosines", "conflict", "weights")],
    "PyTorch Lightning": lightning_trains,
    "Hugging Face Trainer": transformers_trains,
    "LibMTL": libmtl_combines,
    "conflictfree": conflictfree_agrees,
    "Physics-informed networks": lowers_the_losses,
    "Multi-task reinforcement learning": absent_temperature_stays,
}
"""Checks of a section's results, beside the check that parameters have moved or have gradients."""
TRAINS_NOTHING = {"Interrupt and resume", "LibMTL", "conflictfree"}


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, since some examples write files, and stand in for LibMTL, which needs many packages."""
    monkeypatch.chdir(tmp_path)
    for name in ("LibMTL", "LibMTL.weighting", "LibMTL.weighting.abstract_weighting"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(AbsWeighting=nn.Module))


def ran(title: str, blocks: list[str]) -> Names:
    """Run all blocks of a section one after another and return the names afterwards."""
    names = common()
    GIVEN.get(title, lambda names: None)(names)
    names["before"] = [p.detach().clone() for p in names["model"].parameters()]
    for block in blocks:
        # Gradients are freed with their graph, so each block has losses of its own.
        losses = task_losses(names["model"], names["x"], names["y"])
        names |= {"losses": losses} | dict(zip(("loss_a", "loss_b", "loss_c"), losses, strict=True))
        with (
            graphs_without_a_gpu(names) if "CUDAGraph" in block else nullcontext(),
            torch._functorch.config.patch(donated_buffer=torch._functorch.config.donated_buffer),  # put back afterwards
            torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag),
        ):
            exec(block.replace('"cuda"', '"cpu"'), names)
    return names


@pytest.mark.parametrize("title", SECTIONS)
def test_its_examples_run(title: str, somewhere: None) -> None:
    """Run every Python block, one after another within its section, on a small model."""
    names = ran(title, SECTIONS[title])
    AFTER.get(title, lambda names: None)(names)
    if title not in TRAINS_NOTHING:
        after = list(names["model"].parameters())
        moved = any(not torch.equal(a, b) for a, b in zip(names["before"], after, strict=True))
        assert moved or any(p.grad is not None for p in after)


@interpreter.interpreted
def test_its_cuda_graph_needs_the_steps_before(somewhere: None) -> None:
    """Remove the warm-up from the example: it fails, so the README cannot lose the warm-up unnoticed."""
    blocks = list(SECTIONS["Use it"])
    i = next(i for i, block in enumerate(blocks) if "CUDAGraph" in block)
    warm_up = blocks[i][blocks[i].index("side = ") : blocks[i].index("graph = ")]
    blocks[i] = blocks[i].replace(warm_up, "")
    with pytest.raises(RuntimeError, match="run the same step once before, to lay out its work"):
        ran("Use it", blocks)


def test_every_recipe_has_its_section() -> None:
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"tasks.py", "cost.py"}
    assert len(recipes) > 15
    assert {name for name in recipes if f"](recipes/{name})" not in README} == set()


def test_the_api_reference_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = next(line for line in README.splitlines() if "&& pdoc " in line).partition("&& pdoc ")[2]
    modules = [word for word in command.split() if word.startswith("gradkern")]
    options = command.replace("-o api", f"-o {tmp_path}").split()
    subprocess.run([sys.executable, "-m", "pdoc", *options], check=True, capture_output=True, cwd=ROOT)
    for module in modules:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        public = getattr(sys.modules.get(module), "__all__", ())
        assert all(f'id="{name}"' in page for name in public), module
    assert 'id="PCGradAMP"' in (tmp_path / "gradkern/compat/amp.html").read_text()
