"""Tests of the recipe for multi-task SAC: its losses by another library, its steps by the reference."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import gradkern as gk
from gradkern import reference
from tests.models import flat, task_gradients
from tests.recipes.test_recipes import ORDER, bits, recipe
from tests.tolerances import TOLERANCES, assert_near

rl = recipe("multitask_rl")
# A float32 Gramian's roundings, which nearly parallel rows magnify.
PROJECTED = 1e-4


def start() -> tuple[rl.Agent, list[rl.Batch]]:
    agent = rl.build(rl.SMALL)
    agent.actor_opt.aggregator = agent.critic_opt.aggregator = gk.PCGrad(order=ORDER)
    with torch.no_grad():
        for log_alpha, value in zip(agent.log_alphas, (-0.5, 0.0, 0.7), strict=True):
            log_alpha.fill_(value)
    return agent, rl.replay(rl.SMALL, torch.Generator().manual_seed(1))


def policy(actor: nn.Module, observation: Tensor) -> TransformedDistribution:
    mean, log_std = actor.layers(observation).chunk(2, -1)
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])


def test_an_action_has_the_density_of_torch_distributions() -> None:
    agent, (batch, *_) = start()
    torch.manual_seed(1)
    action, log_prob = agent.actor(batch.observation)
    torch.manual_seed(1)
    expected = policy(agent.actor, batch.observation)
    drawn = expected.rsample()
    # A few float32 roundings of numbers around 1.
    assert_near(action.detach(), drawn.detach(), 1.0, 1e-5)
    assert_near(log_prob.detach(), expected.log_prob(drawn).detach(), 1.0, 1e-5)
    action, log_prob = agent.actor(1e4 * batch.observation)  # tanh is 1 here
    assert action.abs().max() == 1
    assert log_prob.isfinite().all()


def sac_losses(agent: rl.Agent, task: int, batch: rl.Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of critic, actor and temperature as Haarnoja et al. 2018 write them (eq. 5, 7 and 18)."""
    alpha = agent.log_alphas[task].exp()
    with torch.no_grad():
        chosen = policy(agent.actor, batch.next_observation)
        action = chosen.rsample()
        soft = torch.stack(agent.target(batch.next_observation, action)).amin(0) - alpha * chosen.log_prob(action)
        goal = torch.where(batch.done == 1, batch.reward, batch.reward + 0.99 * soft)
    critic = sum((q - goal).square().mean() for q in agent.critic(batch.observation, batch.action))
    chosen = policy(agent.actor, batch.observation)
    action = chosen.rsample()
    log_prob = chosen.log_prob(action)
    value = torch.stack(agent.critic(batch.observation, action)).amin(0)
    actor = (alpha.detach() * log_prob - value).mean()
    temperature = (-alpha * (log_prob.detach() - rl.SMALL.action)).mean()  # the entropy aimed at is -action
    return critic, actor, temperature


@pytest.mark.parametrize("task", range(3))
def test_its_losses_are_those_of_the_paper(task: int) -> None:
    agent, batches = start()
    batches[task].done[:10] = 1
    nn.init.normal_(agent.target.trunk[0].weight)  # so that the target is not the critic
    torch.manual_seed(2)
    critic, actor, temperature = sac_losses(agent, task, batches[task])
    torch.manual_seed(2)
    assert_near(rl.critic_loss(agent, task, batches[task]).detach(), critic.detach(), critic.detach(), 1e-5)
    loss = rl.actor_loss(agent, task, batches[task])
    assert_near(loss.detach(), (actor + temperature).detach(), 1.0, 1e-5)
    mine, theirs = (task_gradients([value], agent.log_alphas)[0] for value in (loss, temperature))
    assert [g is None for g in mine] == [t != task for t in range(3)]
    assert_near(mine[task], theirs[task], 1.0, 1e-5)


def combined(losses: Sequence[Tensor], params: list[nn.Parameter], order: list[list[int]]) -> tuple[Tensor, ...]:
    """Return the reference's update and Gramian, and the sum of the gradients' lengths."""
    rows = [flat(row, params) for row in task_gradients(losses, params)]
    return reference.pcgrad_update(rows, order), reference.gramian(rows), sum(row.norm() for row in rows)


@pytest.mark.filterwarnings("error")  # as if the losses reach tensors that their optimizer lacks
@pytest.mark.parametrize("n_present", [3, 2])
def test_the_gradients_of_each_step_are_the_references(n_present: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "LR", 3e-3)  # soon past the first steps, in which all critic losses agree
    agent, _ = start()
    generator = torch.Generator().manual_seed(1)
    present = range(n_present)
    order = [[j for j in ORDER[i] if j in present] for i in present]
    conflicts = {"critic": 0, "actor": 0}

    def losses_of(loss: Callable[[rl.Agent, int, rl.Batch], Tensor], batches: list[rl.Batch]) -> list[Tensor]:
        torch.manual_seed(3)  # for the actions, which the losses draw one task after another
        return [loss(agent, task, batches[task]) for task in present]

    def check(info: gk.SurgeryInfo, params: list[nn.Parameter], expected: tuple[Tensor, ...], of: str) -> None:
        update, M, scale = expected
        assert info.losses.isnan().tolist() == [task not in present for task in range(3)]
        assert_near(flat([p.grad for p in params], params), update, scale, PROJECTED)
        assert_near(info.gramian[:n_present, :n_present], M, scale**2, TOLERANCES[torch.float32])
        conflicts[of] += int(info.conflicts.any())

    for _ in range(40):
        batches = rl.replay(rl.SMALL, generator)
        given = [batch if task in present else None for task, batch in enumerate(batches)]
        params = list(agent.critic.parameters())
        expected = combined(losses_of(rl.critic_loss, batches), params, order)
        torch.manual_seed(3)
        check(rl.update_critic(agent, given), params, expected, "critic")

        params = list(agent.actor.parameters())
        losses = losses_of(rl.actor_loss, batches)
        expected = combined(losses, params, order)
        temperatures = [row[t] for t, row in enumerate(task_gradients(losses, agent.log_alphas))]
        before = bits([agent.critic.state_dict(), [p.grad for p in agent.critic.parameters()]])
        torch.manual_seed(3)
        check(rl.update_actor(agent, given), params, expected, "actor")  # temperatures are not in the Gramian
        assert [p.grad is None for p in agent.log_alphas] == [task not in present for task in range(3)]
        assert all(torch.equal(p.grad, g) for p, g in zip(agent.log_alphas, temperatures, strict=False))
        assert bits([agent.critic.state_dict(), [p.grad for p in agent.critic.parameters()]]) == before
        assert all(p.requires_grad for p in agent.critic.parameters())
    assert min(conflicts.values()) > 5, conflicts


def test_an_absent_task_keeps_its_temperature() -> None:
    """Its temperature has been trained before, so Adam's momentum would move it if it had a gradient of zeros."""
    agent, batches = start()
    rl.train_step(agent, batches)
    absent = [agent.log_alphas[1], agent.actor_opt.state[agent.log_alphas[1]]]
    before, others = bits(absent), bits([agent.log_alphas[0], agent.log_alphas[2]])
    rl.train_step(agent, [batches[0], None, batches[2]])
    assert bits(absent) == before
    assert all(a != b for a, b in zip(bits([agent.log_alphas[0], agent.log_alphas[2]]), others, strict=True))


@pytest.mark.parametrize("kind", ["one tensor", "stacked"])
def test_temperatures_in_one_tensor_are_under_surgery_as_the_recipe_warns(kind: str) -> None:
    agent, batches = start()
    torch.manual_seed(4)
    alone = rl.update_actor(agent, batches).gramian
    agent, batches = start()
    values = [p.detach().clone().requires_grad_() for p in agent.log_alphas]
    trained = values if kind == "stacked" else [torch.stack(values).detach().requires_grad_()]
    agent.actor_opt = gk.SurgeryOptimizer(
        torch.optim.Adam([*agent.actor.parameters(), *trained], rl.LR), gk.PCGrad(order=ORDER)
    )

    def step(given: list[rl.Batch | None]) -> gk.SurgeryInfo:
        # The losses of all tasks read the one tensor, or the one stack of this step.
        agent.log_alphas = torch.stack(values) if kind == "stacked" else trained[0]
        return rl.update_actor(agent, given, lambda opt, losses: opt.backward(losses, retain_graph=True))

    torch.manual_seed(4)
    assert (step(batches).gramian.diagonal() > alone.diagonal()).all()
    before = torch.stack(values).detach() if kind == "stacked" else trained[0].detach().clone()
    step([batches[0], None, batches[2]])
    after = torch.stack(values).detach() if kind == "stacked" else trained[0].detach()
    assert after[1] != before[1]


def test_the_target_follows_by_polyaks_average() -> None:
    agent, batches = start()
    before = [p.clone() for p in agent.target.parameters()]
    rl.train_step(agent, batches)
    for old, new, p in zip(before, agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert not torch.equal(old, p)
        assert_near(new, (0.995 * old.double() + 0.005 * p.double()).detach(), old.abs(), 3e-7)  # float32's roundings
        assert not torch.equal(new, old)
        assert new.grad is None


def test_the_replayed_transitions_say_their_task() -> None:
    batches = rl.replay(rl.SMALL, torch.Generator().manual_seed(5))
    for task, batch in enumerate(batches):
        for observation in (batch.observation, batch.next_observation):
            assert observation.shape == (32, 6 + 3)
            assert (observation[:, 6:] == nn.functional.one_hot(torch.tensor(task), 3)).all()
        assert batch.action.abs().max() <= 1
        assert batch.reward.shape == batch.done.shape == (32,)
    assert bits(batches) == bits(rl.replay(rl.SMALL, torch.Generator().manual_seed(5)))


def test_it_learns_and_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rl.main()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "nan" not in out
    first, last = (float(text) for text in out.split(",")[0].removeprefix("critic loss ").split(" -> "))
    # The values start near 0, so the first loss is about twice the rewards' variance, most of which can be learned.
    assert last < 0.9 * first
