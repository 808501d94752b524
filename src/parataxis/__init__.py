"""Sample diffusion models parallel in time: the same sample as the sequential loop's, in far fewer rounds."""

from . import stopping
from .loops import Report, parallel
from .samplers import SAMPLERS, Sampler
from .schedules import cosine, flow, karras, vp
from .solve import OutputError, Run, Solution, Solutions, sample, start, together
from .solvers import LAW_EXACT, SOLVERS, Anderson, Parareal, Picard, Secant, Sequential
from .table import LocalForm, Table
from .trajectories import load_trajectory, save_trajectory

__all__ = [
    "LAW_EXACT",
    "SAMPLERS",
    "SOLVERS",
    "Anderson",
    "LocalForm",
    "OutputError",
    "Parareal",
    "Picard",
    "Report",
    "Run",
    "Sampler",
    "Secant",
    "Sequential",
    "Solution",
    "Solutions",
    "Table",
    "cosine",
    "flow",
    "karras",
    "load_trajectory",
    "parallel",
    "sample",
    "save_trajectory",
    "start",
    "stopping",
    "together",
    "vp",
]
__version__ = "0.1.0"
