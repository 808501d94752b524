"""Meta-World tasks (1910.10897) as the policies of this folder see them. Needs the extra ``policy``.

A Sawyer arm whose hand is moved by actions (4,): displacements along x, y, z in units of 1 cm a step, and the effort of
the gripper, each in [-1, 1]. A step is 12.5 ms of physics.
"""

import numpy as np
from metaworld import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Simulator:
    """One task; every reset draws where things are from its own seed.

    Args:
        task: Such as ``reach-v3``.
        render: Open an off-screen renderer, for :meth:`picture`.
        pixels: Width and height of a picture.
    """

    def __init__(self, task: str, *, render: bool = False, pixels: int = 256) -> None:
        kwargs = (
            {"render_mode": "rgb_array", "camera_name": "corner4", "width": pixels, "height": pixels} if render else {}
        )
        self.env = ALL_V3_ENVIRONMENTS[task](**kwargs)
        self.env._partially_observable = False  # the goal is part of the observation ...
        self.env.__dict__.pop("sawyer_observation_space", None)  # ... and is not clipped to the space without it
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env._set_task_called = True
        self.expert_policy = ENV_POLICY_MAP[task]()

    def reset(self, seed: int) -> Array:
        """Return the first observation (39,), metres: 18 entries of this step, 18 of the step before, the goal (3,)."""
        self.env.seed(seed)
        observation, _ = self.env.reset()
        return observation

    def step(self, action: Array) -> tuple[Array, bool]:
        """Take one action (4,); return the observation (39,) and whether the task is solved now."""
        observation, _, _, _, info = self.env.step(np.clip(action, -1, 1))
        return observation, bool(info["success"])

    def expert(self, observation: Array) -> Array:
        """Return the action (4,) of the scripted expert that comes with the task."""
        # A copy, because some experts change what they are given.
        return np.clip(np.asarray(self.expert_policy.get_action(observation.copy()), float), -1, 1)

    def picture(self) -> NDArray[np.uint8]:
        """Return what the camera sees, (pixels, pixels, 3)."""
        return self.env.render()[::-1, ::-1]  # the camera hangs upside down
