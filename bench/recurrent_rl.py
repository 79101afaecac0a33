"""Recurrent reinforcement learning: an agent that must remember, trained by PPO on whole rollouts.

    pip install 'fused-lstm[rl]'
    python -m fused_lstm.bench.recurrent_rl

N environments run side by side for T steps: a rollout. In it episodes end and begin anywhere. Three things make a
recurrent agent learn from it, and each has its place below:

- `reset` (`ActorCritic.forward`). Where an episode begins, the LSTM must forget the one before. The usual way is a loop
  over the T steps that multiplies the state by 1 - done. Here one call of the LSTM walks all T steps, and `reset` says
  where episodes begin; no gradient crosses such a place.
- off by one (`Actor.collect`). `done` at step t tells that the action of step t ended an episode, so the observation of
  step t + 1 is the first of another one: done[t] is reset[t + 1].
- the carried state (`Actor.collect`). The state after a rollout enters the next one, since most episodes go on there.
  Gradients stop at that border, and the state that entered is kept with the rollout: learning starts from it.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

try:
    import typer
    from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"recurrent_rl: {error}; pip install 'fused-lstm[rl]'")

import torch
from torch import Tensor, nn

import fused_lstm
from fused_lstm.bench.devices import find_device
from fused_lstm.bench.errors import Interrupted, UserError
from fused_lstm.bench.rl_maze import TMaze

State = tuple[Tensor, Tensor]


class ActorCritic(nn.Module):
    """An LSTM with two heads: a policy, and an estimate of the return.

    The state in which an episode begins is learned too, and given to the LSTM as `reset_state`. Without it episodes
    would begin in zeros.
    """

    def __init__(self, observation_size: int, action_count: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        # It starts by remembering: at a forget bias of 0 half of the state would be gone after each step.
        self.lstm = fused_lstm.LSTM(observation_size, hidden_size, forget_bias=2.0, backend=backend)
        self.policy = nn.Linear(hidden_size, action_count)
        self.value = nn.Linear(hidden_size, 1)
        self.first_h = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.first_c = nn.Parameter(torch.zeros(1, 1, hidden_size))

    def first_state(self, batch_size: int) -> State:
        """h and c (1, N, H) before an episode's first observation."""
        return self.first_h.expand(-1, batch_size, -1), self.first_c.expand(-1, batch_size, -1)

    def forward(self, observations: Tensor, state: State, begins: Tensor) -> tuple[Tensor, Tensor, State]:
        """One step or a whole rollout, in one call.

        Args:
            observations: (T, N, O)
            state: h and c (1, N, H) that enter step 0
            begins: (T, N), true where the observation is the first of an episode

        Returns:
            logits of the actions (T, N, A), values (T, N), and the state after step T - 1
        """
        reset_state = self.first_state(observations.size(1))
        hidden, state = self.lstm(observations, state, reset=begins, reset_state=reset_state)
        return self.policy(hidden), self.value(hidden).squeeze(-1), state


@dataclass
class Rollout:
    """T steps of N environments, as the agent of that time saw and judged them.

    Attributes:
        state: h and c (1, N, H) that entered step 0
        observations: (T, N, O)
        begins: (T + 1, N), whether the observation is the first of an episode; so begins[1:] is done, from 1 to T
        actions, log_probabilities, rewards: (T, N); the log-probabilities are those of the actions
        values: (T + 1, N); the last are of the observations after the rollout
    """

    state: State
    observations: Tensor
    begins: Tensor
    actions: Tensor
    log_probabilities: Tensor
    rewards: Tensor
    values: Tensor


class Actor:
    """Walks the environments on, and holds what goes from one rollout to the next.

    Args:
        agent: on the device where it shall run
        envs: N environments; in the step that ends an episode they show the first observation of the next one already.
            Their episodes end for good: one that is merely cut off has a future, whose value would have to be added to
            its last reward
        seed: of the environments
    """

    def __init__(self, agent: ActorCritic, envs: VectorEnv, seed: int) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"Expected envs of autoreset_mode {AutoresetMode.SAME_STEP}, got {mode}")
        self.agent = agent
        self.envs = envs
        self.device = agent.first_h.device
        self.observation = self._tensor(envs.reset(seed=seed)[0])
        self.begins = torch.ones(envs.num_envs, dtype=torch.bool, device=self.device)
        # Only its shape matters, since each environment begins an episode; learning must not find its way back from it.
        self.state = fused_lstm.detach_state(agent.first_state(envs.num_envs))

    @torch.no_grad()  # so the carried state is a detached one
    def collect(self, steps: int) -> Rollout:
        """The next T steps."""
        state = self.state
        records = []
        for _ in range(steps):
            logits, value, self.state = self.agent(self.observation[None], self.state, self.begins[None])
            policy = torch.distributions.Categorical(logits=logits[0], validate_args=False)
            action = policy.sample()
            seen = self.observation, self.begins, action, policy.log_prob(action), value[0]
            observation, reward, terminated, truncated, _ = self.envs.step(action.cpu().numpy())
            records.append((*seen, self._tensor(reward).to(value.dtype)))
            self.observation = self._tensor(observation)
            self.begins = self._tensor(terminated | truncated)
        # The values after the rollout; the state that comes out is left, as the next rollout makes this step itself.
        _, value, _ = self.agent(self.observation[None], self.state, self.begins[None])
        observations, begins, actions, log_probabilities, values, rewards = map(torch.stack, zip(*records, strict=True))
        begins = torch.cat([begins, self.begins[None]])
        values = torch.cat([values, value])
        return Rollout(state, observations, begins, actions, log_probabilities, rewards, values)

    def _tensor(self, array) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def estimate_advantages(rewards: Tensor, values: Tensor, done: Tensor, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016).

    A_t = δ_t + γλ (1 - done_t) A_{t+1} with δ_t = r_t + γ (1 - done_t) V_{t+1} - V_t, and A_T = 0.

    Args:
        rewards: (T, N)
        values: (T + 1, N)
        done: (T, N), whether the action of the step ended the episode
        discount: γ
        decay: λ; at 1 the advantage is the discounted return less the value, at 0 it is δ

    Returns:
        (T, N); added to values[:-1] they are the returns that the values shall learn
    """
    goes_on = (~done).to(values.dtype)
    errors = rewards + discount * goes_on * values[1:] - values[:-1]
    advantages = torch.empty_like(errors)
    advantage = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        advantage = errors[t] + discount * decay * goes_on[t] * advantage
        advantages[t] = advantage
    return advantages


@dataclass(frozen=True)
class Ppo:
    """The constants of learning, most of them as everybody has them (Schulman et al. 2017)."""

    learning_rate: float = 2e-3
    discount: float = 0.99
    decay: float = 0.95
    epochs: int = 4
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    largest_gradient: float = 0.5


PPO = Ppo()


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, rollout: Rollout, ppo: Ppo) -> None:
    """Learns from a rollout: a few steps of the optimiser, each on all of it."""
    begins, done = rollout.begins[:-1], rollout.begins[1:]
    advantages = estimate_advantages(rollout.rewards, rollout.values, done, ppo.discount, ppo.decay)
    returns = advantages + rollout.values[:-1]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for _ in range(ppo.epochs):
        logits, values, _ = agent(rollout.observations, rollout.state, begins)  # T steps, one call
        policy = torch.distributions.Categorical(logits=logits, validate_args=False)
        ratio = (policy.log_prob(rollout.actions) - rollout.log_probabilities).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * advantages).mean()
        value_loss = (values - returns).square().mean()
        loss = ppo.value_weight * value_loss - gain - ppo.entropy_weight * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), ppo.largest_gradient)
        optimizer.step()


@dataclass(frozen=True)
class Options:
    """What a run computes. The field `hidden_size` is the option --hidden-size, and so on.

    Attributes:
        steps: of all environments together; as many whole rollouts as fit in, and one at least
        envs: N, environments side by side
        corridor: of `TMaze`
        hidden_size: H
        seed: of the weights, the mazes and the actions
        device: "auto" (CUDA if there), or what `torch.device` takes
        backend: of `fused_lstm.LSTM`
    """

    steps: int = 200_000
    envs: int = 64
    corridor: int = 10
    hidden_size: int = 32
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"

    @property
    def rollout_steps(self) -> int:
        """T: two corridors, so that most turns have their cue in the same rollout, and gradients reach it."""
        return 2 * self.corridor

    @property
    def updates(self) -> int:
        return max(1, self.steps // (self.rollout_steps * self.envs))

    def check(self) -> None:
        """Finds what cannot work before anything is done.

        Raises:
            UserError: a value is out of its range
        """
        largest = {"steps": 10**9, "envs": 1 << 16, "corridor": 1 << 16, "hidden_size": 1 << 16, "seed": (1 << 63) - 1}
        for name, last in largest.items():
            first = 0 if name == "seed" else 1
            if not first <= getattr(self, name) <= last:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} is {getattr(self, name)}", f"give a whole number from {first} to {last}")


def learn(options: Options, ppo: Ppo = PPO) -> Iterator[list[bool]]:
    """Trains an agent. After each update comes a list: of each episode that ended in the rollout, whether it succeeded.

    On one machine the same options give the same numbers.
    """
    torch.manual_seed(options.seed)
    mazes = [partial(TMaze, options.corridor)] * options.envs
    envs = SyncVectorEnv(mazes, autoreset_mode=AutoresetMode.SAME_STEP)
    sizes = envs.single_observation_space.shape[0], int(envs.single_action_space.n), options.hidden_size
    agent = ActorCritic(*sizes, backend=options.backend).to(find_device(options.device))
    optimizer = torch.optim.Adam(agent.parameters(), ppo.learning_rate)
    actor = Actor(agent, envs, options.seed)
    for _ in range(options.updates):
        rollout = actor.collect(options.rollout_steps)
        update(agent, optimizer, rollout, ppo)
        yield (rollout.rewards[rollout.begins[1:]] > 0).tolist()


# From here on: the command.

DEFAULTS = Options()
JUDGED = 1000  # episodes, the last ones: their success rate is the result


def train(
    steps: Annotated[int, typer.Option(help="Steps of all environments together.")] = DEFAULTS.steps,
    envs: Annotated[int, typer.Option(help="Environments side by side.")] = DEFAULTS.envs,
    corridor: Annotated[int, typer.Option(help="Places to the farthest junction.")] = DEFAULTS.corridor,
    hidden_size: Annotated[int, typer.Option(help="LSTM units.")] = DEFAULTS.hidden_size,
    seed: Annotated[int, typer.Option(help="Seed of weights, mazes and actions.")] = DEFAULTS.seed,
    device: Annotated[str, typer.Option(help="auto (cuda if there), cpu, cuda, cuda:1, ...")] = DEFAULTS.device,
    backend: Annotated[str, typer.Option(help="What runs fused_lstm.LSTM.")] = DEFAULTS.backend,
) -> None:
    """Train an agent that must remember: a cue at the start of a maze says which way to turn at its end."""
    options = Options(steps, envs, corridor, hidden_size, seed, device, backend)
    options.check()
    choice = _backend(options)
    torch.set_num_threads(1)  # the steps are small, and more threads would only wait for each other
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"mazes    {envs}, up to {corridor} places from the cue to the junction")
    console.print(f"rollout  {envs} × {options.rollout_steps} steps, {options.updates:,} updates")
    console.print(f"backend  {choice.name} ({choice.reason})\n")

    start = time.perf_counter()
    recent: deque[bool] = deque(maxlen=JUDGED)
    episodes = 0
    with _progress(console) as bar:
        task = bar.add_task("", total=options.updates, success="")
        updates = 0
        try:
            for outcomes in learn(options):
                updates += 1
                episodes += len(outcomes)
                recent.extend(outcomes)
                bar.update(task, completed=updates, success=_rate(recent))
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted at update {updates} of {options.updates}") from None
    seconds = time.perf_counter() - start

    done = options.updates * options.rollout_steps * envs
    console.print(f"{done:,} steps, {episodes:,} episodes, {seconds:.1f} s")
    outcome = f"{_rate(recent)} of the last {len(recent):,} episodes; without memory 50 % at best"
    console.print(f"success  {outcome if recent else 'no episode has ended yet; give more --steps'}")


def _rate(outcomes: Sequence[bool]) -> str:
    return f"{sum(outcomes) / len(outcomes):.1%}".replace("%", " %") if outcomes else ""


def _progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("success {task.fields[success]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _backend(options: Options) -> fused_lstm.BackendChoice:
    try:
        return fused_lstm.select_backend(
            options.backend,
            device=find_device(options.device),
            dtype=torch.float32,
            hidden_size=options.hidden_size,
            batch_size=options.envs,
            options=["reset"],
        )
    except ValueError as error:
        raise UserError(str(error).rstrip("."), "leave --backend out to run what fits") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; None: those of the process

    Returns:
        the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    try:
        return app(args=arguments, prog_name="recurrent_rl", standalone_mode=False) or 0
    except UserError as error:
        return _say(str(error), 2)
    except Interrupted as error:
        return _say(str(error), 130)
    except (typer.Abort, KeyboardInterrupt):
        return _say("interrupted", 130)
    except Exception as error:
        # Typer has brought click from outside and from inside; its usage errors share this method alone.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().rstrip(".")
        return _say(f"{message}; see --help", 2)


def _say(text: str, status: int) -> int:
    print("recurrent_rl:", " ".join(text.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
