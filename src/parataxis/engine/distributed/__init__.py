"""Many devices for one sample."""

from ..fingerprint import fingerprint
from .control import RankError
from .ranks import Ranks, Sharded, sharded

__all__ = ["RankError", "Ranks", "Sharded", "fingerprint", "sharded"]
