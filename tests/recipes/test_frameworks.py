"""The recipes for frameworks and other libraries: each trains like a loop written by hand, or like the original."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.models import flat, problem, task_gradients
from tests.problems import PROBLEMS
from tests.tolerances import TOLERANCES, assert_near

IN_ORDER = partial(gk.PCGrad, order=range(3))
GRADVAC = partial(gk.GradVac, beta=0.5)  # it has a state that a resumed run needs, and draws random orders
NEEDS = {
    "accelerate_loop": "accelerate",
    "conflictfree_operator": "conflictfree",
    "hf_trainer": "transformers",
    "libmtl_weighting": "torch",  # and LibMTL, which a fixture replaces here
    "lightning_module": "lightning",
}


def recipe(name: str) -> Any:
    pytest.importorskip(NEEDS[name])
    return importlib.import_module(f"recipes.{name}")


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default, so that a step by hand differs only by roundings, which Adam does not amplify."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gk, "PCGrad", IN_ORDER)


@pytest.fixture
def with_gradvac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gk, "PCGrad", GRADVAC)


def by_hand(losses: Sequence[Tensor], trunk: nn.Module, heads: nn.Module) -> None:
    """Add the reference's gradients to ``.grad``: PCGrad in task order for the trunk, the sum for the heads."""
    shared, own = list(trunk.parameters()), list(heads.parameters())
    rows = [flat(g, shared) for g in task_gradients(losses, shared)]
    g = torch.stack(reference.pcgrad(rows, [range(3)] * 3)).sum(0)
    found = [*(piece.view_as(p) for p, piece in zip(shared, g.split([p.numel() for p in shared]), strict=True))]
    found += torch.autograd.grad(sum(losses), own)
    for p, piece in zip(shared + own, found, strict=True):
        p.grad = piece.to(p) if p.grad is None else p.grad + piece.to(p)


def big_batch(losses: list[list[Tensor]]) -> list[Tensor]:
    """Return the losses of one big batch, from those of several batches of equal size."""
    return [sum(task_losses) / len(losses) for task_losses in zip(*losses, strict=True)]


def accumulated(params: list[nn.Parameter], batches: list[Callable[[], list[Tensor]]]) -> None:
    """Fill ``.grad`` from batches in bfloat16, without a framework."""
    surgery = gk.SurgeryOptimizer(torch.optim.SGD(params), gk.PCGrad())
    with surgery.accumulate():
        for batch_losses in batches:
            with torch.autocast("cpu", torch.bfloat16):
                losses = batch_losses()
            surgery.backward([loss.float() / len(batches) for loss in losses])


def assert_trained_alike(one: nn.Module, other: nn.Module, start: nn.Module) -> None:
    """Check that both models agree up to float64's roundings over about ten steps, and that they moved."""
    moved = 0.0
    for p, q, s in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert_near(p, q, 1.0, 1e-10)
        moved = max(moved, (p - s).abs().max().item())
    assert moved > 1e-3


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NEEDS)
def test_one_line_is_printed_and_no_file_left(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if name == "libmtl_weighting":
        request.getfixturevalue("libmtl")
    monkeypatch.chdir(tmp_path)
    recipe(name).main()
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- Lightning ---------------------------------------------------------------------------------------------------


def lightning_fit(model: Any, dataset: Any, epochs: int, **options: Any) -> Any:
    import lightning as L

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    loader_of = torch.utils.data.DataLoader(dataset, batch_size=16)
    resume = options.pop("ckpt_path", None)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_model_summary=False, **options)
    trainer.fit(model, loader_of, ckpt_path=resume)
    return trainer


def lightning_loop(model: Any, dataset: Any, epochs: int, backward: Callable[[Any, Any], None]) -> None:
    """Train like the recipe, without Lightning."""
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    for epoch in range(epochs):
        opt.param_groups[0]["lr"] = 0.01 * 0.9**epoch
        for batch in torch.utils.data.DataLoader(dataset, batch_size=16):
            opt.zero_grad()
            backward(opt, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()


def lightning_models(r: Any, n: int) -> tuple[list[Any], Any]:
    models = [r.MultiTask() for _ in range(n)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models, r.data()


def test_lightning_is_a_loop_by_hand(float64: None, in_order: None) -> None:
    r = recipe("lightning_module")
    (model, hand, start), dataset = lightning_models(r, 3)
    trainer = lightning_fit(model, dataset, 2, precision="64-true")
    lightning_loop(hand, dataset, 2, lambda opt, batch: by_hand(hand.losses(*batch), hand.trunk, hand.heads))
    assert trainer.global_step == 8
    assert_trained_alike(model, hand, start)


def test_lightning_in_bfloat16(in_order: None) -> None:
    r = recipe("lightning_module")
    (model, hand, full), dataset = lightning_models(r, 3)
    lightning_fit(model, dataset, 2, precision="bf16-mixed")
    lightning_fit(full, dataset, 2)

    def backward(opt: Any, batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            losses = hand.losses(*batch)
        gk.backward(losses, hand, aggregator=gk.PCGrad())

    lightning_loop(hand, dataset, 2, backward)
    assert same(model, hand)
    assert not same(model, full)


SCALE = 2.0**12  # the first step overflows float16, the others do not


def test_lightning_scales_losses_and_skips_steps_that_overflow(in_order: None) -> None:
    r = recipe("lightning_module")
    from lightning.pytorch.plugins import MixedPrecision

    (model, hand), dataset = lightning_models(r, 2)
    scaler, by = (torch.amp.GradScaler("cpu", init_scale=SCALE) for _ in range(2))
    lightning_fit(model, dataset, 2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    opt = torch.optim.AdamW(hand.parameters(), lr=0.01)
    for epoch in range(2):
        opt.param_groups[0]["lr"] = 0.01 * 0.9**epoch
        for batch in torch.utils.data.DataLoader(dataset, batch_size=16):
            opt.zero_grad()
            with torch.autocast("cpu", torch.float16):
                losses = hand.losses(*batch)
            gk.backward(by.scale(losses), hand, aggregator=gk.PCGrad())
            by.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.0)
            by.step(opt)
            by.update()
    assert scaler.get_scale() == by.get_scale() == SCALE / 2
    assert same(model, hand)


def test_lightning_resumes_to_the_bit(tmp_path: Path, with_gradvac: None) -> None:
    r = recipe("lightning_module")
    (whole, half), dataset = lightning_models(r, 2)
    torch.manual_seed(0)
    lightning_fit(whole, dataset, 2)
    torch.manual_seed(0)
    trainer = lightning_fit(half, dataset, 1)
    generator = torch.get_rng_state()  # Lightning's checkpoint does not hold it
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = r.MultiTask()
    torch.set_rng_state(generator)
    trainer = lightning_fit(resumed, dataset, 2, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**2)
    assert same(resumed, whole)
    assert not same(half, whole)


@pytest.mark.parametrize("call", ["backward", "accumulate", "update"])
def test_state_between_backward_and_step_survives_lightnings_wrapper(call: str) -> None:
    r = recipe("lightning_module")

    class Other(r.MultiTask):
        def configure_optimizers(self) -> Any:
            inner = gk.optim.AdamW(self.named_parameters(), lr=0.01)
            return gk.SurgeryOptimizer(inner, IN_ORDER(), conflict_lr=gk.ConflictLR())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            train(self.optimizers(), self, batch)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

        def on_train_epoch_end(self) -> None:
            pass

    def train(opt: Any, model: Any, batch: list[Tensor]) -> None:
        opt.zero_grad()
        if call == "update":
            opt.update(model.losses(*batch), max_norm=1.0)
        else:
            with opt.accumulate() if call == "accumulate" else nullcontext():
                opt.backward(model.losses(*batch))
            opt.step()

    model, hand, start = Other(), Other(), Other()
    for other in (hand, start):
        other.load_state_dict(model.state_dict())
    dataset = r.data()
    trainer = lightning_fit(model, dataset, 1)
    opt = hand.configure_optimizers()
    for batch in torch.utils.data.DataLoader(dataset, batch_size=16):
        train(opt, hand, batch)
    assert trainer.global_step == 4
    for p, q, s in zip(model.parameters(), hand.parameters(), start.parameters(), strict=True):
        # Without the conflict's scale the difference would be 1e-3. Under the wrapper an update is not one pass: it
        # clips by the norm of the gradient itself and rounds differently. Adam turns this into up to 1e-3 of a step of
        # 0.01.
        assert_near(p, q, 1.0, 2e-5)
        assert not torch.equal(p, s)


def test_a_step_within_accumulate_raises_under_lightning_too() -> None:
    r = recipe("lightning_module")

    class Early(r.MultiTask):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            opt = self.optimizers()
            with opt.accumulate():
                opt.backward(self.losses(*batch))
                opt.step()

    with pytest.raises(RuntimeError, match=r"step\(\) within accumulate\(\)"):
        lightning_fit(Early(), r.data(), 1)


# --- Accelerate --------------------------------------------------------------------------------------------------


def accelerate_loop(model: Any, dataset: Any, epochs: int, backward: Callable[[list[Any]], None]) -> None:
    """Train like the recipe with two batches per step, without Accelerate."""
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=16))
    for step in range(epochs * len(batches) // 2):
        opt.param_groups[0]["lr"] = 0.01 * 0.99**step
        opt.zero_grad()
        backward([batches[k % len(batches)] for k in (2 * step, 2 * step + 1)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()


def accelerate_run(r: Any, dataset: Any, epochs: int, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    from accelerate import Accelerator

    resume = options.pop("resume", None)
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(seed)
    return accelerator, r.train(accelerator, dataset, epochs, resume)


def test_accelerate_is_a_loop_by_hand(float64: None, in_order: None) -> None:
    r = recipe("accelerate_loop")
    dataset = r.data()
    _, model = accelerate_run(r, dataset, 4)
    torch.manual_seed(0)
    hand = r.MultiTask()
    torch.manual_seed(0)
    start = r.MultiTask()

    def backward(batches: list[Any]) -> None:
        by_hand(big_batch([hand(*batch) for batch in batches]), hand.trunk, hand.heads)

    accelerate_loop(hand, dataset, 4, backward)
    assert_trained_alike(model, hand, start)


def test_accelerate_in_bfloat16(in_order: None) -> None:
    r = recipe("accelerate_loop")
    dataset = r.data()
    _, model = accelerate_run(r, dataset, 4, mixed_precision="bf16")
    torch.manual_seed(0)
    hand = r.MultiTask()

    def backward(batches: list[Any]) -> None:
        accumulated(list(hand.parameters()), [partial(hand, *batch) for batch in batches])

    accelerate_loop(hand, dataset, 4, backward)
    assert same(model, hand)


def test_accelerate_resumes_to_the_bit(tmp_path: Path, with_gradvac: None) -> None:
    r = recipe("accelerate_loop")
    dataset = r.data()
    _, whole = accelerate_run(r, dataset, 4)
    accelerator, half = accelerate_run(r, dataset, 2)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    _, resumed = accelerate_run(r, dataset, 2, seed=1, resume=str(tmp_path))
    assert same(resumed, whole)
    assert not same(half, whole)


def test_accelerates_scaler_scales_the_losses(in_order: None) -> None:
    """Accelerate makes a scaler only on GPUs, so the test sets one."""
    r = recipe("accelerate_loop")
    from accelerate import Accelerator

    x, y = r.data().tensors
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        model = r.MultiTask()
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        model, opt = accelerator.prepare(model, gk.SurgeryOptimizer(inner, gk.PCGrad()))
        r.backward(accelerator, model, opt, [(x, y)])
        results.append((model.heads[0].weight.grad.clone(), model))
        opt.step()
    (grad, model), (scaled_grad, unscaled_model) = results
    assert torch.equal(scaled_grad, 2.0**10 * grad)
    assert same(model, unscaled_model)


# --- Transformers ------------------------------------------------------------------------------------------------


def hf_trainer(r: Any, folder: Path, model: Any, dataset: Any, **options: Any) -> Any:
    from transformers import PrinterCallback, TrainingArguments

    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "save_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **options)
    trainer = r.SurgeryTrainer(model, arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def hf_model(r: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = r.MultiTask()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def hf_loop(model: Any, batches: list[Any], backward: Callable[[list[Any]], None]) -> None:
    """Train like the Trainer with the arguments above: five batches per epoch, two per step."""
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(6):
        # The rate rises linearly in two steps, then falls to 0 after six.
        opt.param_groups[0]["lr"] = 0.01 * (step / 2 if step < 2 else (6 - step) / 4)
        first = 5 * (step // 3) + 2 * (step % 3)
        opt.zero_grad()
        backward(batches[first : first + (1 if step % 3 == 2 else 2)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()


def recorded(model: Any) -> list[Any]:
    """Return a list that collects the batches ``model`` sees, because the Trainer shuffles them."""
    batches: list[Any] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    return batches


def test_hf_trainer_is_a_loop_by_hand(tmp_path: Path, float64: None, in_order: None) -> None:
    r = recipe("hf_trainer")
    model, hand, start = (hf_model(r) for _ in range(3))
    batches = recorded(model)
    trainer = hf_trainer(r, tmp_path, model, r.data(80))
    trainer.train()

    def backward(batches: list[Any]) -> None:
        by_hand(big_batch([hand(**batch)["losses"] for batch in batches]), hand.bert, hand.heads)

    hf_loop(hand, batches, backward)
    assert trainer.state.global_step == 6
    assert len(batches) == 10
    assert_trained_alike(model, hand, start)


def test_hf_trainer_in_bfloat16(tmp_path: Path, in_order: None) -> None:
    r = recipe("hf_trainer")
    model, hand = hf_model(r), hf_model(r)
    batches = recorded(model)
    trainer = hf_trainer(r, tmp_path, model, r.data(80), bf16=True, optim="adamw_torch")
    trainer.train()
    decayed = set(trainer.get_decay_parameter_names(hand))  # these come first in the Trainer's optimizer
    params = [p for _, p in sorted(hand.named_parameters(), key=lambda pair: pair[0] not in decayed)]

    def backward(batches: list[Any]) -> None:
        accumulated(params, [lambda batch=batch: hand(**batch)["losses"] for batch in batches])

    hf_loop(hand, batches, backward)
    assert same(model, hand)


def test_hf_trainer_resumes_to_the_bit(tmp_path: Path, with_gradvac: None) -> None:
    """Dropout is on, because the Trainer saves the state of the generator."""
    r = recipe("hf_trainer")
    dataset = r.data(80)
    whole, resumed = hf_model(r, 0.1), hf_model(r, 0.1)
    saving = {"save_strategy": "steps", "save_steps": 2}
    hf_trainer(r, tmp_path, whole, dataset, **saving).train()
    trainer = hf_trainer(r, tmp_path / "resumed", resumed, dataset, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert same(whole, resumed)
    assert "surgery" in torch.load(tmp_path / "checkpoint-4" / "optimizer.pt")


def test_hf_trainer_trains_again_after_an_interruption_within_a_step(tmp_path: Path, in_order: None) -> None:
    r = recipe("hf_trainer")
    model, fresh = hf_model(r), hf_model(r)
    dataset = r.data(32)

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    trainer = hf_trainer(r, tmp_path, model, dataset, num_train_epochs=1)
    hook = model.heads[2].bias.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    surgery = trainer.optimizer.optimizer
    trainer.train()
    hf_trainer(r, tmp_path, fresh, dataset, num_train_epochs=1).train()
    assert same(model, fresh)
    assert trainer.optimizer.optimizer is surgery
    assert isinstance(surgery, gk.SurgeryOptimizer)
    assert isinstance(surgery.optimizer, torch.optim.AdamW)


# --- LibMTL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def libmtl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The parts of LibMTL that a weighting uses; its release needs a torchvision older than this torch."""

    class AbsWeighting(nn.Module):
        def init_param(self) -> None:
            pass

    class HPS(nn.Module):
        def __init__(
            self, task_name: Any, encoder_class: Any, decoders: Any, rep_grad: bool, multi_input: bool, device: Any
        ) -> None:
            super().__init__()
            self.task_name, self.rep_grad, self.device = task_name, rep_grad, device
            self.decoders, self.encoder = decoders, encoder_class()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {task: self.decoders[task](self.encoder(x)) for task in self.task_name}

        def get_share_params(self) -> Iterator[nn.Parameter]:
            return self.encoder.parameters()

    modules = {name: ModuleType(name) for name in ("LibMTL", "LibMTL.architecture", "LibMTL.weighting")}
    modules["LibMTL.weighting.abstract_weighting"] = ModuleType("abstract_weighting")
    modules["LibMTL.architecture"].HPS = HPS  # type: ignore[attr-defined]
    modules["LibMTL.weighting.abstract_weighting"].AbsWeighting = AbsWeighting  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("recipes.libmtl_weighting", None)


def libmtl_model(r: Any, rep_grad: bool = False) -> tuple[Any, Callable[[], Tensor]]:
    """Return a model and its losses, which are written into one tensor as LibMTL's Trainer does."""
    network, x, y = problem()
    decoders = nn.ModuleDict({str(t): head for t, head in enumerate(network.heads)})
    model = r.MTLModel(list(decoders), lambda: network.trunk, decoders, rep_grad, False, torch.device("cpu"))
    model.init_param()

    def losses() -> Tensor:
        found = torch.zeros(3)
        for t, output in enumerate(model(x).values()):
            found[t] = (output.squeeze(-1) - y[t]).square().mean()
        return found

    return model, losses


def test_libmtl_gets_the_references_gradients(libmtl: None, float64: None, in_order: None) -> None:
    model, losses = libmtl_model(recipe("libmtl_weighting"))
    for _ in range(2):  # LibMTL's Trainer may zero gradients in place
        model.zero_grad(set_to_none=False)
        assert model.backward(losses()) is None
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    by_hand(losses().unbind(), model.encoder, model.decoders)
    for g, p in zip(found, model.parameters(), strict=True):
        assert_near(g, p.grad, p.grad.abs().max(), TOLERANCES[torch.float64])


def test_libmtl_gradients_of_representations_raise(libmtl: None, float64: None) -> None:
    model, losses = libmtl_model(recipe("libmtl_weighting"), rep_grad=True)
    with pytest.raises(ValueError, match="rep_grad must be False"):
        model.backward(losses())


# --- conflictfree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_conflictfrees_own_operator(T: int, problem: str) -> None:
    r = recipe("conflictfree_operator")
    from conflictfree.grad_operator import PCGradOperator

    J = PROBLEMS[problem](T, 40)
    ours, theirs = (operator.calculate_gradient(list(J)) for operator in (r.PCGradOperator(), PCGradOperator()))
    assert_near(ours, theirs, J.abs().sum(0), 1e-12)


def test_conflictfrees_update_gradient() -> None:
    """The inherited method works on a network that all losses reach, in float64."""
    r = recipe("conflictfree_operator")
    from conflictfree.grad_operator import PCGradOperator
    from conflictfree.utils import get_gradient_vector

    results = []
    for operator in (r.PCGradOperator(), PCGradOperator()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
        x, y = torch.randn(16, 6).double(), 3 * torch.randn(16, 3).double()
        opt = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(10):
            grads = []
            for t in range(3):
                opt.zero_grad()
                (model(x) - y)[:, t].square().mean().backward()
                grads.append(get_gradient_vector(model))
            operator.update_gradient(model, grads)
            opt.step()
        results.append(get_gradient_vector(model))
    ours, theirs = results
    assert_near(ours, theirs, theirs.abs().max(), 1e-10)  # roundings of ten steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conflictfrees_training_goes_the_same_way(dtype: torch.dtype) -> None:
    r = recipe("conflictfree_operator")
    from conflictfree.grad_operator import PCGradOperator

    x, y = torch.randn(64, 6).to(dtype), torch.randn(64, 3).to(dtype)
    ours, theirs = (torch.tensor(r.train(o, x, y, 200)) for o in (r.PCGradOperator(), PCGradOperator()))
    assert_near(ours, theirs, theirs, 1e-4 if dtype == torch.float32 else 1e-10)  # roundings that Adam amplifies
    assert ours[-1] < 0.8 * ours[0]


def test_float16_where_conflictfrees_dot_products_overflow() -> None:
    r = recipe("conflictfree_operator")
    J = (PROBLEMS["conflicting"](3, 10_000) * 20).half()
    assert_near(
        r.PCGradOperator().calculate_gradient(J),
        torch.stack(reference.pcgrad(list(J), [range(3)] * 3)).sum(0),
        J.double().abs().sum(0),
        TOLERANCES[torch.float16],
    )
