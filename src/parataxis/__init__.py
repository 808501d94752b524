"""Sample diffusion models parallel in time: the same sample as the sequential loop's, in far fewer rounds."""

from . import stopping
from .driver import Solutions, floor, sample
from .execution import Latency, latency
from .loops import Report, parallel
from .planning import Plan, plan
from .refill import Job, stream
from .samplers import SAMPLERS, Sampler
from .schedulers import read
from .schedules import cosine, flow, karras, vp
from .solve import OutputError, Run, Solution, start, together
from .solvers import LAW_EXACT, SOLVERS, Anderson, Nested, Parareal, Picard, Secant, Sequential, Speculative
from .table import LocalForm, Table
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
