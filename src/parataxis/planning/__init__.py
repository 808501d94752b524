"""Whether many steps side by side are faster here, and by which solver."""

from .candidates import Candidate, Range
from .plans import PLAN_CLASSES, Plan, plan
from .rounds_curve import CURVES, RoundsCurve, features

__all__ = ["CURVES", "PLAN_CLASSES", "Candidate", "Plan", "Range", "RoundsCurve", "features", "plan"]
