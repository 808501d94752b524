"""Many devices for one sample."""

from .control import RankError
from .gather import fingerprint
from .ranks import Ranks, Sharded, sharded

__all__ = ["RankError", "Ranks", "Sharded", "fingerprint", "sharded"]
