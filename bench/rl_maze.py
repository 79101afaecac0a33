"""A T-maze: what is seen at its start says what to do at its end, and nothing in between repeats it."""

from typing import Any

import gymnasium
import numpy as np

OBSERVATIONS = LEFT_CUE, RIGHT_CUE, PASSAGE, JUNCTION = range(4)  # one-hot, in this order
ACTIONS = FORWARD, LEFT, RIGHT = range(3)


class TMaze(gymnasium.Env):
    """A corridor that ends at a junction; a cue at its start tells which way to turn there (after Bakker 2002).

    An episode draws the cue, and the way from the start to the junction: from half of `corridor`, rounded up, to all of
    it, so that counting steps does not lead there. FORWARD goes one place on. A turn at the junction ends the episode:
    reward 1 if it is the cue's, -1 if not. Whatever walks into a wall (FORWARD at the junction, a turn elsewhere) stays
    where it is, for a reward of -0.1. After 4 steps for each place that an episode could have, it is lost: -1.

    All junctions look alike: without memory, and whatever the policy, every other turn is wrong.

    Args:
        corridor: places from the start to the farthest junction, at least 1

    Attributes:
        cue: LEFT or RIGHT, the turn that this episode wants
        length: the place of this episode's junction; the start is 0
    """

    def __init__(self, corridor: int = 10) -> None:
        if corridor < 1:
            raise ValueError(f"Expected corridor to be at least 1, got {corridor}")
        self.corridor = corridor
        self.deadline = 4 * (corridor + 1)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(OBSERVATIONS),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.cue = int(self.np_random.integers(LEFT, RIGHT + 1))
        self.length = int(self.np_random.integers((self.corridor + 1) // 2, self.corridor + 1))
        self.place = 0
        self.steps = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Returns:
        observation (4,) float32, reward, terminated, truncated (never: the deadline is a rule of the maze), info
        """
        self.steps += 1
        at_junction = self.place == self.length
        if at_junction and action != FORWARD:
            return self._observation(), 1.0 if action == self.cue else -1.0, True, False, {}
        walks = action == FORWARD and not at_junction
        if walks:
            self.place += 1
        late = self.steps == self.deadline
        reward = -1.0 if late else 0.0 if walks else -0.1
        return self._observation(), reward, late, False, {}

    def _observation(self) -> np.ndarray:
        seen = PASSAGE
        if self.place == 0:
            seen = LEFT_CUE if self.cue == LEFT else RIGHT_CUE
        elif self.place == self.length:
            seen = JUNCTION
        observation = np.zeros(len(OBSERVATIONS), np.float32)
        observation[seen] = 1.0
        return observation
