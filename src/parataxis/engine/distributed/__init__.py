"""Many devices for one sample."""

from .ranks import RankError, Ranks, Sharded, fingerprint, sharded

__all__ = ["RankError", "Ranks", "Sharded", "fingerprint", "sharded"]
