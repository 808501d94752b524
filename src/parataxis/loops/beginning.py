"""What a loop begins with, to be put back before it runs once more: its world and all random states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .randomness import RandomState
from .world import World

__all__ = ["Beginning"]


class Beginning:
    """The world and the random state that a loop begins with.

    Args:
        world: All that it reaches.
        random: All random states.
    """

    def __init__(self, world: World, random: RandomState) -> None:
        self.world, self.random = world, random
        random.worlds.append(world)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch a run of the loop, so that it can be put back behind it as it was."""
        with self.random:
            yield

    def unwatched(self) -> AbstractContextManager[None]:
        """Let nothing be watched for a while."""
        return self.random.paused()

    def can_restore(self) -> bool:
        """Return whether everything that the loop reaches can be put back as it was."""
        return not self.world.obstacles and not self.world.is_lost()

    def restore(self, *, everything: bool = False) -> bool:
        """Put back what the loop reaches, and the random state; return whether nothing was lost.

        Args:
            everything: Also what networks write by themselves.
        """
        whole = self.world.restore(everything=everything)
        self.random.restore()
        return whole
