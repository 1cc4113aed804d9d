"""Multi-task reinforcement learning: one step of SAC (Haarnoja et al. 2018) for several tasks, with surgery.

PCGrad's own experiments in reinforcement learning are of this kind (Yu et al. 2020). One critic and one actor serve all
tasks and see a task's number as a one-hot vector. The tasks' losses of the critic go through one surgery, those of the
actor through another. Three things need care:

- Each task has its own temperature, and the temperatures are T tensors. One tensor with T entries would be reached by
  every task's loss, with zeros for the other tasks' entries. It would then count as shared and be under surgery, and
  Adam's momentum would move the temperature of a task that is absent. Stacked tensors have the same gradients of zeros.
- The critic is frozen while the actor's losses run. They reach it, but the actor's optimizer does not train it.
- Each loss is a callable with a forward pass of its own, so its backward pass goes through its own batch only. After
  one forward pass for all tasks, each task's backward pass would go through the batches of all.

Run ``python recipes/multitask_rl.py``, or with ``--cost`` for the time of a step at the size of Meta-World's MT10.
There is no environment: the transitions are random, and each task has a reward of its own.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from cost import Backward, measure, report
from torch import Tensor, nn

import gradkern as gk

GAMMA, POLYAK, LR = 0.99, 0.995, 3e-4


class Size(NamedTuple):
    """The number of tasks, the dimensions of observations, actions and hidden layers, and the transitions per task."""

    tasks: int
    observation: int
    action: int
    hidden: int
    batch: int


SMALL, MT10 = Size(3, 6, 2, 32, 32), Size(10, 39, 4, 400, 128)


class Batch(NamedTuple):
    """Transitions of one task: (B, ...) each. Observations end with the one-hot vector of the task."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    done: Tensor


def layers(*sizes: int) -> nn.Sequential:
    """Return linear layers of these sizes with a ReLU after each."""
    return nn.Sequential(*(layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())))


class Critic(nn.Module):
    """Two estimates of an action's value, from one trunk."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.trunk = layers(size.observation + size.tasks + size.action, size.hidden, size.hidden)
        self.twins = nn.ModuleList(
            nn.Sequential(layers(size.hidden, size.hidden), nn.Linear(size.hidden, 1)) for _ in range(2)
        )

    def forward(self, observation: Tensor, action: Tensor) -> list[Tensor]:
        """Return both values, (B,) each."""
        h = self.trunk(torch.cat([observation, action], -1))
        return [twin(h).squeeze(-1) for twin in self.twins]


class Actor(nn.Module):
    """A Gaussian, squashed by tanh."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = layers(size.observation + size.tasks, size.hidden, size.hidden, size.hidden)
        self.layers = nn.Sequential(hidden, nn.Linear(size.hidden, 2 * size.action))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Draw an action, (B, A), for each observation; return it and the logarithm of its density, (B,)."""
        mean, log_std = self.layers(observation).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        # log(1 - tanh²), the logarithm of tanh's slope, in a form that does not underflow
        log_slope = 2 * (math.log(2) - before - nn.functional.softplus(-2 * before))
        log_prob = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2 - log_slope
        return before.tanh(), log_prob.sum(-1)


@dataclass
class Agent:
    """All that a step reads and changes."""

    actor: Actor
    critic: Critic
    target: Critic  # follows the critic slowly
    log_alphas: list[Tensor]  # logarithms of the temperatures: one tensor per task, since a common one is shared
    actor_opt: gk.SurgeryOptimizer
    critic_opt: gk.SurgeryOptimizer
    target_entropy: float


def build(size: Size) -> Agent:
    """Return an agent. The temperatures are trained by the actor's optimizer."""
    torch.manual_seed(0)
    actor, critic = Actor(size), Critic(size)
    log_alphas = [torch.zeros((), requires_grad=True) for _ in range(size.tasks)]
    actor_opt = gk.SurgeryOptimizer(torch.optim.Adam([*actor.parameters(), *log_alphas], LR), gk.PCGrad())
    critic_opt = gk.SurgeryOptimizer(torch.optim.Adam(critic.parameters(), LR), gk.PCGrad())
    target = copy.deepcopy(critic).requires_grad_(False)
    return Agent(actor, critic, target, log_alphas, actor_opt, critic_opt, -float(size.action))


def critic_loss(agent: Agent, task: int, batch: Batch) -> Tensor:
    """Return the squared errors of both values for one task."""
    with torch.no_grad():
        action, log_prob = agent.actor(batch.next_observation)
        value = torch.minimum(*agent.target(batch.next_observation, action))
        value = value - agent.log_alphas[task].exp() * log_prob
        goal = batch.reward + GAMMA * (1 - batch.done) * value
    return sum(nn.functional.mse_loss(q, goal) for q in agent.critic(batch.observation, batch.action))


def actor_loss(agent: Agent, task: int, batch: Batch) -> Tensor:
    """Return the sum of the actor's loss and the temperature's loss for one task.

    The first part reaches the actor only, and the second the task's temperature only. The temperature therefore gets
    its own gradient, without surgery.
    """
    action, log_prob = agent.actor(batch.observation)
    value = torch.minimum(*agent.critic(batch.observation, action))
    alpha = agent.log_alphas[task].exp()
    too_certain = (log_prob.detach() + agent.target_entropy).mean()
    return (alpha.detach() * log_prob - value).mean() - alpha * too_certain


def losses_of(
    loss: Callable[[Agent, int, Batch], Tensor], agent: Agent, batches: Sequence[Batch | None]
) -> list[Callable[[], Tensor] | None]:
    """Return one callable per task, None for a task without a batch."""
    return [None if batch is None else partial(loss, agent, task, batch) for task, batch in enumerate(batches)]


def update_critic(
    agent: Agent, batches: Sequence[Batch | None], backward: Backward = gk.SurgeryOptimizer.backward
) -> gk.SurgeryInfo | None:
    """Train the critic; return what ``backward``, which fills ``.grad``, returns."""
    agent.critic_opt.zero_grad()
    info = backward(agent.critic_opt, losses_of(critic_loss, agent, batches))
    agent.critic_opt.step()
    return info


def update_actor(
    agent: Agent, batches: Sequence[Batch | None], backward: Backward = gk.SurgeryOptimizer.backward
) -> gk.SurgeryInfo | None:
    """Train the actor and the temperatures of the tasks that have a batch; return as ``update_critic``."""
    agent.actor_opt.zero_grad()
    agent.critic.requires_grad_(False)
    info = backward(agent.actor_opt, losses_of(actor_loss, agent, batches))
    agent.critic.requires_grad_(True)
    agent.actor_opt.step()
    return info


def update_target(agent: Agent) -> None:
    """Move the target toward the critic."""
    with torch.no_grad():
        for slow, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
            slow.lerp_(fast, 1 - POLYAK)


def train_step(
    agent: Agent, batches: Sequence[Batch | None], backward: Backward = gk.SurgeryOptimizer.backward
) -> gk.SurgeryInfo | None:
    """Take a whole step; return the info of the critic's surgery. A task that is absent has None in ``batches``."""
    info = update_critic(agent, batches, backward)
    update_actor(agent, batches, backward)
    update_target(agent)
    return info


def replay(size: Size, generator: torch.Generator) -> list[Batch]:
    """Return a batch of random transitions for each task. What task 0 rewards, task 1 punishes."""
    directions = torch.randn(size.tasks, size.observation + size.action, generator=torch.Generator().manual_seed(0))
    directions[1] = -directions[0]

    def batch(task: int) -> Batch:
        number = nn.functional.one_hot(torch.tensor(task), size.tasks).float().expand(size.batch, -1)
        now, later = torch.randn(2, size.batch, size.observation, generator=generator)
        action = 2 * torch.rand(size.batch, size.action, generator=generator) - 1
        reward = torch.cat([now, action], 1) @ directions[task]
        done = (torch.rand(size.batch, generator=generator) < 0.05).float()
        return Batch(torch.cat([now, number], 1), action, reward, torch.cat([later, number], 1), done)

    return [batch(task) for task in range(size.tasks)]


def main() -> None:
    """Train for 200 steps; one task is absent from every second step."""
    agent, generator = build(SMALL), torch.Generator().manual_seed(1)
    errors, conflicts = [], []
    for step in range(200):
        batches = replay(SMALL, generator)
        info = train_step(agent, [*batches[:-1], batches[-1] if step % 2 == 0 else None])
        errors.append(info.losses[:-1].mean().item())
        conflicts.append(info.conflicts[0, 1].item())
    first, last = (sum(part) / 20 for part in (errors[:20], errors[-20:]))
    alphas = ", ".join(f"{log_alpha.exp():.3f}" for log_alpha in agent.log_alphas)
    share = sum(conflicts) / len(conflicts)
    print(f"critic loss {first:.2f} -> {last:.2f}, tasks 0 and 1 in conflict in {share:.0%} of steps, alpha {alphas}")


def cost() -> None:
    """Print the time of a step of MT10's size with and without surgery."""
    batches = replay(MT10, torch.Generator().manual_seed(1))

    def step_with(backward: Backward) -> Callable[[], object]:
        agent = build(MT10)
        return lambda: train_step(agent, batches, backward)

    print(report(measure(step_with)))


if __name__ == "__main__":
    cost() if sys.argv[1:] == ["--cost"] else main()
