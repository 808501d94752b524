"""Sample diffusion models parallel in time: the same sample as the sequential loop's, in far fewer rounds."""

from . import stopping
from .engine.latency import Latency, latency
from .engine.solve import OutputError, Run, Solution, start, together
from .loops.solving import Report
from .parallel import parallel
from .planning import Plan, plan
from .sample import Job, Solutions, floor, sample, stream
from .samplers import SAMPLERS, Sampler
from .samplers.coefficients import LocalForm
from .samplers.from_scheduler import read
from .samplers.recurrence import Table
from .samplers.schedules import cosine, flow, karras, vp
from .solvers import LAW_EXACT, SOLVERS, Anderson, Nested, Parareal, Picard, Secant, Sequential, Speculative
from .trajectories import load_trajectory, save_trajectory

__all__ = [
    "LAW_EXACT",
    "SAMPLERS",
    "SOLVERS",
    "Anderson",
    "Job",
    "Latency",
    "LocalForm",
    "Nested",
    "OutputError",
    "Parareal",
    "Picard",
    "Plan",
    "Report",
    "Run",
    "Sampler",
    "Secant",
    "Sequential",
    "Solution",
    "Solutions",
    "Speculative",
    "Table",
    "cosine",
    "floor",
    "flow",
    "karras",
    "latency",
    "load_trajectory",
    "plan",
    "read",
    "parallel",
    "sample",
    "save_trajectory",
    "start",
    "stream",
    "stopping",
    "together",
    "vp",
]
__version__ = "0.1.0"
