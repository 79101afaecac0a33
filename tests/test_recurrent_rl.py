"""The recurrent RL example: its maze, its rollouts, what it learns by and that it learns."""

import subprocess
import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from runs import randn

from fused_lstm.bench import recurrent_rl
from fused_lstm.bench.recurrent_rl import (
    Actor,
    ActorCritic,
    Options,
    Ppo,
    Rollout,
    estimate_advantages,
    learn,
    main,
    update,
)
from fused_lstm.bench.rl_maze import FORWARD, JUNCTION, LEFT, LEFT_CUE, PASSAGE, RIGHT, RIGHT_CUE, TMaze

CUES = {LEFT: LEFT_CUE, RIGHT: RIGHT_CUE}


# The maze.


def begun(corridor: int, **wanted) -> tuple[TMaze, np.ndarray]:
    """A maze whose episode is one of those wanted, and its first observation."""
    maze = TMaze(corridor)
    for seed in range(1000):
        observation, _ = maze.reset(seed=seed)
        if all(getattr(maze, name) == value for name, value in wanted.items()):
            return maze, observation
    raise AssertionError(f"no episode has {wanted}")


def walk(maze: TMaze, *actions: int) -> list[tuple[int, float, bool]]:
    """What each action brings: the kind of place seen, reward, end."""
    steps = []
    for action in actions:
        observation, reward, terminated, truncated, info = maze.step(action)
        assert observation.sum() == observation.max() == 1
        assert (truncated, info) == (False, {})
        steps.append((int(observation.argmax()), reward, terminated))
    return steps


def test_maze_keeps_the_interface():
    check_env(TMaze(4), skip_render_check=True)


@pytest.mark.parametrize("cue", [LEFT, RIGHT])
@pytest.mark.parametrize("turn", [LEFT, RIGHT])
def test_a_turn_at_the_junction_ends_the_episode(cue, turn):
    maze, first = begun(5, cue=cue, length=3)
    assert first.argmax() == CUES[cue]
    way = [(PASSAGE, 0.0, False), (PASSAGE, 0.0, False), (JUNCTION, 0.0, False)]
    assert walk(maze, FORWARD, FORWARD, FORWARD, turn) == [*way, (JUNCTION, 1.0 if turn == cue else -1.0, True)]


def test_walls_hold():
    maze, _ = begun(5, cue=RIGHT, length=3)
    assert walk(maze, LEFT, RIGHT) == [(RIGHT_CUE, -0.1, False)] * 2
    assert walk(maze, FORWARD, LEFT, RIGHT) == [(PASSAGE, 0.0, False), *[(PASSAGE, -0.1, False)] * 2]
    assert walk(maze, FORWARD, FORWARD)[-1] == (JUNCTION, 0.0, False)
    assert walk(maze, FORWARD) == [(JUNCTION, -0.1, False)]
    assert walk(maze, RIGHT) == [(JUNCTION, 1.0, True)]


def test_the_deadline():
    """An episode is lost with step 4 (corridor + 1), unless this one is the right turn."""
    maze, _ = begun(2, cue=LEFT, length=2)
    assert walk(maze, *[RIGHT] * 12) == [*[(LEFT_CUE, -0.1, False)] * 11, (LEFT_CUE, -1.0, True)]
    maze, _ = begun(2, cue=LEFT, length=2)
    assert walk(maze, FORWARD, FORWARD, *[FORWARD] * 9, LEFT)[-1] == (JUNCTION, 1.0, True)
    maze, _ = begun(2, cue=LEFT, length=2)
    assert walk(maze, *[RIGHT] * 11, FORWARD)[-1] == (PASSAGE, -1.0, True)


@pytest.mark.parametrize(("corridor", "lengths"), [(1, [1]), (2, [1, 2]), (5, [3, 4, 5]), (6, [3, 4, 5, 6])])
def test_what_an_episode_draws(corridor, lengths):
    """Every pair of cue and length, about as often as any other."""
    maze = TMaze(corridor)
    maze.reset(seed=0)
    drawn = []
    for _ in range(2000):
        maze.reset()
        drawn.append((maze.cue, maze.length))
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert pairs.tolist() == [[cue, length] for cue in (LEFT, RIGHT) for length in lengths]
    expected = 2000 / len(pairs)
    assert abs(counts - expected).max() < 5 * expected**0.5


def test_a_seed_says_what_is_drawn():
    def drawn(seed):
        maze = TMaze(20)
        maze.reset(seed=seed)
        episodes = [(maze.cue, maze.length)]
        for _ in range(20):
            maze.reset()
            episodes.append((maze.cue, maze.length))
        return episodes

    assert drawn(3) == drawn(3) != drawn(4)


def test_memory_is_needed():
    """Past the first place, mazes of either cue look the same: whatever a policy without memory does, every other of
    its turns is wrong."""
    actions = [FORWARD, LEFT, FORWARD, FORWARD, FORWARD]
    for turn in (LEFT, RIGHT):
        left, right = (walk(begun(4, cue=cue, length=3)[0], *actions, turn) for cue in (LEFT, RIGHT))
        assert left[:-1] == right[:-1]
        assert {left[-1], right[-1]} == {(JUNCTION, 1.0, True), (JUNCTION, -1.0, True)}


def test_a_corridor_has_a_place():
    with pytest.raises(ValueError, match=r"^Expected corridor to be at least 1, got 0$"):
        TMaze(0)


# A rollout in one call.

STEPS, ROWS, HIDDEN = 9, 4, 5
# Row 0 begins an episode at once, at the end and in between; row 1 twice in a row; row 2 never; row 3 at each step.
BEGINS = torch.tensor(
    [[1, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1], *[[0, 0, 0, 1]] * 4, [1, 0, 0, 1]]
).bool()


def episodes(begins: torch.Tensor) -> list[tuple[int, int]]:
    """The (first step, end) of each episode of a row, or part of one."""
    borders = sorted({0, len(begins), *begins.nonzero().flatten().tolist()})
    return list(pairwise(borders))


def one_by_one(lstm, observations, state, begins, first_state):
    """torch's LSTM on each episode alone, from first_state or, where a row goes on with one, from state."""
    alone = torch.nn.LSTM(lstm.input_size, lstm.hidden_size, dtype=observations.dtype)
    parameters = dict(lstm.named_parameters())
    outputs, last = [], []
    for n in range(observations.size(1)):
        pieces = []
        for first, end in episodes(begins[:, n]):
            entering = [s[:, n : n + 1] for s in (first_state if begins[first, n] else state)]
            arguments = observations[first:end, n : n + 1], tuple(entering)
            with torch.backends.cudnn.flags(enabled=False):  # which warns of weights that lie apart
                piece, leaving = torch.func.functional_call(alone, parameters, arguments)
            pieces.append(piece)
        outputs.append(torch.cat(pieces))
        last.append(leaving)
    h, c = (torch.cat(each, dim=1) for each in zip(*last, strict=True))
    return torch.cat(outputs, dim=1), (h, c)


def assert_same_with_gradients(found, expected, leaves):
    """Of all results, and of every leaf that any of them depends on."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    d_results = [randn(*result.shape, seed=20 + k, device=result.device) for k, result in enumerate(found)]
    gradients = [
        torch.autograd.grad(results, leaves, d_results, materialize_grads=True) for results in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        assert b.abs().max() > 1e-3


@pytest.fixture(params=["reference", "stepwise"])
def agent(request, device) -> ActorCritic:
    torch.manual_seed(0)
    agent = ActorCritic(4, 3, HIDDEN, backend=request.param).to(device, torch.float64)
    torch.nn.init.normal_(agent.first_h)
    torch.nn.init.normal_(agent.first_c)
    return agent


def entering(device):
    return tuple(randn(1, ROWS, HIDDEN, seed=k, device=device, requires_grad=True) for k in (1, 2))


def test_rollout_is_its_episodes_one_by_one(agent, device):
    """The agent, whose episodes begin in a state that it learns."""
    observations, state = randn(STEPS, ROWS, 4, device=device, requires_grad=True), entering(device)
    logits, values, (h, c) = agent(observations, state, BEGINS.to(device))
    hidden, expected_state = one_by_one(agent.lstm, observations, state, BEGINS, agent.first_state(ROWS))
    assert_same_with_gradients(
        (logits, values, h, c),
        (agent.policy(hidden), agent.value(hidden).squeeze(-1), *expected_state),
        [observations, *state, *agent.parameters()],
    )


def test_without_reset_state_episodes_begin_in_zeros(agent, device):
    observations, state = randn(STEPS, ROWS, 4, device=device, requires_grad=True), entering(device)
    output, (h, c) = agent.lstm(observations, state, reset=BEGINS.to(device))
    zeros = [torch.zeros_like(each) for each in state]
    expected, expected_state = one_by_one(agent.lstm, observations, state, BEGINS, zeros)
    leaves = [observations, *state, *agent.lstm.parameters()]
    assert_same_with_gradients((output, h, c), (expected, *expected_state), leaves)


# Walking through mazes.


def make_actor(corridor=2, envs=3, seed=5, device="cpu") -> Actor:
    torch.manual_seed(seed)
    agent = ActorCritic(4, 3, HIDDEN).to(device, torch.float64)
    mazes = SyncVectorEnv([partial(TMaze, corridor)] * envs, autoreset_mode=AutoresetMode.SAME_STEP)
    actor = Actor(agent, mazes, seed)
    actor.observation = actor.observation.double()
    actor._tensor = lambda array: doubled(torch.from_numpy(array).to(device))
    return actor


def doubled(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def test_rollouts_are_what_happened(device):
    """Each environment's actions, played again in a maze of the same seed; across the border of two rollouts."""
    actor = make_actor(device=device)
    first, second = actor.collect(30), actor.collect(7)
    assert torch.equal(first.begins[-1], second.begins[0])
    for name in ("observations", "actions", "rewards"):
        assert getattr(first, name).shape[:2] == (30, 3)
    ended = 0
    for n in range(3):
        maze = TMaze(2)
        observation, _ = maze.reset(seed=5 + n)
        begins = True
        for rollout in (first, second):
            for t in range(len(rollout.actions)):
                assert rollout.observations[t, n].tolist() == observation.tolist()
                assert rollout.begins[t, n] == begins
                observation, reward, begins, _, _ = maze.step(int(rollout.actions[t, n]))
                assert rollout.rewards[t, n] == reward
                if begins:
                    observation, _ = maze.reset()
                    ended += 1
    assert ended == first.begins[1:].sum() + second.begins[1:].sum() > 5


def test_one_call_sees_what_the_steps_saw(device):
    """Log-probabilities and values of a rollout that was walked step by step, from the state that entered it."""
    actor = make_actor(device=device)
    for steps in (30, 7, 1):
        rollout = actor.collect(steps)
        assert not any(each.requires_grad for each in (*rollout.state, rollout.values, rollout.log_probabilities))
        logits, values, state = actor.agent(rollout.observations, rollout.state, rollout.begins[:-1])
        log_probabilities = logits.log_softmax(-1).gather(-1, rollout.actions[..., None]).squeeze(-1)
        torch.testing.assert_close(log_probabilities, rollout.log_probabilities)
        torch.testing.assert_close(values, rollout.values[:-1])
        torch.testing.assert_close(state, actor.state)
        _, after, _ = actor.agent(actor.observation[None], actor.state, actor.begins[None])
        torch.testing.assert_close(after[0], rollout.values[-1])


def test_the_border_needs_its_state(device):
    """Nothing of it is beside the point: from zeros the second rollout would look different."""
    actor = make_actor(device=device)
    actor.collect(30)
    rollout = actor.collect(7)
    goes_on = ~rollout.begins[0]
    assert goes_on.any()
    zeros = tuple(torch.zeros_like(each) for each in rollout.state)
    _, values, _ = actor.agent(rollout.observations, zeros, rollout.begins[:-1])
    assert ((values - rollout.values[:-1])[0, goes_on].abs() > 1e-6).all()


def test_environments_that_begin_anew_a_step_later_are_refused():
    mazes = SyncVectorEnv([TMaze], autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(ValueError, match=r"^Expected envs of autoreset_mode .*SAME_STEP, got .*NEXT_STEP$"):
        Actor(ActorCritic(4, 3, HIDDEN), mazes, seed=0)


# Learning.


def oracle_advantages(rewards, values, done, discount, decay):
    """The sum that defines it, for each step anew: Σ_l (γλ)^l δ_{t+l}, to the end of the episode or the rollout."""
    advantages = np.zeros_like(rewards)
    steps, rows = rewards.shape
    for n in range(rows):
        for t in range(steps):
            for k in range(t, steps):
                future = 0.0 if done[k, n] else values[k + 1, n]
                error = rewards[k, n] + discount * future - values[k, n]
                advantages[t, n] += (discount * decay) ** (k - t) * error
                if done[k, n]:
                    break
    return advantages


@pytest.mark.parametrize(("discount", "decay"), [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (13, 3)])
def test_advantages(steps, rows, discount, decay):
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(steps, rows)), generator.normal(size=(steps + 1, rows))
    done = generator.random((steps, rows)) < 0.25
    done[:, 0] = False
    given = [torch.from_numpy(array) for array in (rewards, values, done)]
    found = estimate_advantages(*given, discount, decay).numpy()
    np.testing.assert_allclose(found, oracle_advantages(rewards, values, done, discount, decay), rtol=0, atol=1e-12)


def test_returns_without_decay_are_discounted_rewards():
    """λ = 1, and an episode that ends: advantage and value add up to what the episode brings."""
    rewards, values = randn(5, 1, seed=1), randn(6, 1, seed=2)
    done = torch.tensor([[0], [0], [1], [0], [1]]).bool()
    returns = estimate_advantages(rewards, values, done, 0.5, 1.0) + values[:-1]
    r = rewards[:, 0].tolist()
    expected = [r[0] + r[1] / 2 + r[2] / 4, r[1] + r[2] / 2, r[2], r[3] + r[4] / 2, r[4]]
    torch.testing.assert_close(returns[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_what_happens_past_an_end_is_no_ones_merit():
    rewards, values = randn(6, 2, seed=1), randn(7, 2, seed=2)
    done = torch.zeros(6, 2, dtype=torch.bool)
    done[2] = True
    before = estimate_advantages(rewards, values, done, 0.99, 0.95)
    rewards[3:], values[3:] = 100.0, float("nan")
    after = estimate_advantages(rewards, values.nan_to_num(1e6), done, 0.99, 0.95)
    assert torch.equal(before[:3], after[:3])
    assert not (before[3:] == after[3:]).any()


def make_rollout(agent: ActorCritic, shift: float = 0.0) -> Rollout:
    """Random, and as the agent judges it; each action was likelier then, by shift in the log-probability."""
    state = tuple(randn(1, ROWS, HIDDEN, seed=k) for k in (1, 2))
    observations = randn(STEPS, ROWS, 4, seed=3)
    begins = torch.cat([BEGINS, torch.ones(1, ROWS, dtype=torch.bool)])
    actions = torch.arange(STEPS * ROWS).view(STEPS, ROWS) % 3
    with torch.no_grad():
        logits, values, _ = agent(observations, state, BEGINS)
    log_probabilities = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1) + shift
    values = torch.cat([values, randn(1, ROWS, seed=4)])
    return Rollout(state, observations, begins, actions, log_probabilities, randn(STEPS, ROWS, seed=5), values)


def step_taken(agent: ActorCritic, rollout: Rollout, **constants) -> dict[str, torch.Tensor]:
    """What one update by plain descent at a rate of 1 subtracts from each parameter: its gradient."""
    before = {name: each.detach().clone() for name, each in agent.named_parameters()}
    ppo = Ppo(epochs=1, largest_gradient=float("inf"), **constants)
    update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), rollout, ppo)
    return {name: before[name] - each.detach() for name, each in agent.named_parameters()}


def make_agent() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(4, 3, HIDDEN).double()


def test_first_update_follows_the_policy_gradient():
    """While the agent is the one that acted, PPO's gradient is the plain one: -A ∇log π, and value's, entropy's."""
    found = step_taken(make_agent(), make_rollout(make_agent()))
    agent = make_agent()
    rollout = make_rollout(agent)
    logits, values, _ = agent(rollout.observations, rollout.state, BEGINS)
    log_policy = logits.log_softmax(-1)
    arrays = [each.numpy() for each in (rollout.rewards, rollout.values, rollout.begins[1:])]
    advantages = torch.from_numpy(oracle_advantages(*arrays, 0.99, 0.95))
    scaled = (advantages - advantages.mean()) / advantages.std()
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    loss = -(scaled * log_policy.gather(-1, rollout.actions[..., None]).squeeze(-1)).mean() - 0.01 * entropy
    loss = loss + 0.5 * (values - advantages - rollout.values[:-1]).square().mean()
    loss.backward()
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-8, rtol=1e-6)
        assert parameter.grad.abs().max() > 1e-5


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_policy_stops_where_it_has_moved_far_enough(shift):
    """Far below the old probability only what raises it counts; far above, only what lowers it."""
    only_policy = {"value_weight": 0.0, "entropy_weight": 0.0}
    found = step_taken(make_agent(), make_rollout(make_agent(), shift), **only_policy)
    agent = make_agent()
    rollout = make_rollout(agent, shift)
    logits, _, _ = agent(rollout.observations, rollout.state, BEGINS)
    arrays = [each.numpy() for each in (rollout.rewards, rollout.values, rollout.begins[1:])]
    advantages = torch.from_numpy(oracle_advantages(*arrays, 0.99, 0.95))
    scaled = (advantages - advantages.mean()) / advantages.std()
    counted = scaled * shift > 0  # at 1 the actions have become rarer, by e: only good ones shall become likelier
    ratio = (
        logits.log_softmax(-1).gather(-1, rollout.actions[..., None]).squeeze(-1) - rollout.log_probabilities
    ).exp()
    (-(ratio * scaled * counted).sum() / ratio.numel()).backward()
    for name, parameter in agent.lstm.named_parameters():
        torch.testing.assert_close(found[f"lstm.{name}"], parameter.grad, atol=1e-8, rtol=1e-6)
        assert parameter.grad.abs().max() > 1e-5


def success_rates() -> tuple[float, float]:
    """Of the first and of the last 400 episodes of a short training: some three seconds of one core."""
    options = Options(steps=40_000, envs=64, corridor=5, hidden_size=16, seed=0, device="cpu")
    outcomes = [outcome for each in learn(options) for outcome in each]
    assert len(outcomes) > 2000
    return sum(outcomes[:400]) / 400, sum(outcomes[-400:]) / 400


def test_it_learns():
    """From chance to 95 % and more."""
    early, late = success_rates()
    assert early < 0.6
    assert late >= 0.95


def test_without_memory_it_does_not(monkeypatch):
    """The same training, where each step is taken for the first of an episode."""
    forward = ActorCritic.forward

    def forgetful(self, observations, state, begins):
        return forward(self, observations, state, torch.ones_like(begins))

    monkeypatch.setattr(ActorCritic, "forward", forgetful)
    early, late = success_rates()
    assert early < 0.6
    assert 0.4 < late < 0.6


def test_a_seed_gives_the_same_run():
    short = {"steps": 600, "envs": 8, "corridor": 3, "hidden_size": 4, "device": "cpu"}
    runs = [list(learn(Options(**short, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == Options(**short).updates == 12


# The command.

TINY = ["--steps", "400", "--envs", "8", "--corridor", "2", "--hidden-size", "4", "--device", "cpu"]


def test_command(capsys):
    assert main(TINY) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[:2] == ["mazes    8, up to 2 places from the cue to the junction", "rollout  8 × 4 steps, 12 updates"]
    assert lines[2].startswith("backend  reference (")
    assert lines[4].startswith("384 steps, ")
    assert lines[5].startswith("success  ")
    assert lines[5].endswith("; without memory 50 % at best")


def test_success_is_that_of_the_last_episodes(monkeypatch, capsys):
    """Not of the first 500, all lost: of the 1,000 last ones, of which every fourth is."""
    monkeypatch.setattr(recurrent_rl, "learn", lambda _: [[False] * 500, *[[False, True, True, True]] * 250])
    assert main(TINY) == 0
    out = capsys.readouterr().out
    assert "384 steps, 1,500 episodes, " in out
    assert out.endswith("success  75.0 % of the last 1,000 episodes; without memory 50 % at best\n")


def test_a_run_too_short_for_an_episode(monkeypatch, capsys):
    monkeypatch.setattr(recurrent_rl, "learn", lambda _: [[]])
    assert main([*TINY, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "rollout  8 × 4 steps, 1 updates" in out
    assert "32 steps, 0 episodes, " in out
    assert out.endswith("success  no episode has ended yet; give more --steps\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corridor", "0"], "--corridor is 0; give a whole number from 1 to 65536"),
        (["--envs", "0"], "--envs is 0; give a whole number from 1 to 65536"),
        (["--hidden-size", "0"], "--hidden-size is 0; give a whole number from 1 to 65536"),
        (["--seed", "-1"], "--seed is -1; give a whole number from 0 to 9223372036854775807"),
        (["--device", "abacus"], "--device abacus is no device; give cpu, cuda or cuda:0"),
        (["--backend", "torch"], "backend 'torch' cannot run this: torch.nn.LSTM knows no reset; leave --backend out"),
        (["--backend", "fast"], "backend should be one of 'auto', "),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--colour", "red"], "No such option: --colour"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"recurrent_rl: {message}")
    assert err.count("\n") == 1


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(_):
        yield [True]
        raise KeyboardInterrupt

    monkeypatch.setattr(recurrent_rl, "learn", interrupted)
    assert main(TINY) == 130
    assert capsys.readouterr().err == "recurrent_rl: interrupted at update 1 of 12\n"


@pytest.mark.parametrize("missing", ["gymnasium", "rich"])
def test_what_is_missing_is_named(missing):
    program = f"import runpy, sys; sys.modules[{missing!r}] = None; "
    program += "runpy.run_module('fused_lstm.bench.recurrent_rl', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("recurrent_rl: ")
    assert missing in done.stderr
    assert done.stderr.endswith("; pip install 'fused-lstm[rl]'\n")
    assert done.stderr.count("\n") == 1
