"""The public names; ``parataxis`` loads this module when the first of them is read."""

from . import stopping
from .calibration import Calibration, Setting, calibrate
from .engine.captured import cuda_graph
from .engine.checkpoint import load_runs, save_runs
from .engine.latency import Latency, latency
from .engine.rows import OutputError
from .engine.run import Run, drive, start
from .engine.solution import Solution, Solutions
from .loop_calibration import calibrate_loop
from .loops.report import Report
from .parallel import parallel, plan
from .planning import Plan
from .sample import numerical_floor, sample
from .samplers import SAMPLERS
from .samplers.coefficients import Coefficients
from .samplers.from_scheduler import from_scheduler
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .samplers.schedules import cosine, flow, karras, vp
from .solvers import EXACT_IN_DISTRIBUTION, SOLVERS
from .solvers.anderson import Anderson
from .solvers.coarse_to_fine import CoarseToFine
from .solvers.parareal import Parareal
from .solvers.picard import Picard
from .solvers.secant import Secant
from .solvers.sequential import Sequential
from .solvers.speculative import Speculative
from .streaming import Job, stream
from .trajectories import load_trajectory, save_trajectory
from .verification import verify, verify_loop

__all__ = [
    "EXACT_IN_DISTRIBUTION",
    "SAMPLERS",
    "SOLVERS",
    "Anderson",
    "Calibration",
    "Job",
    "Latency",
    "Coefficients",
    "CoarseToFine",
    "OutputError",
    "Parareal",
    "Picard",
    "Plan",
    "Report",
    "Run",
    "Sampler",
    "Secant",
    "Sequential",
    "Setting",
    "Speculative",
    "Solution",
    "Solutions",
    "Recurrence",
    "calibrate",
    "calibrate_loop",
    "cosine",
    "cuda_graph",
    "numerical_floor",
    "flow",
    "karras",
    "latency",
    "load_runs",
    "load_trajectory",
    "plan",
    "from_scheduler",
    "parallel",
    "sample",
    "save_runs",
    "save_trajectory",
    "start",
    "stream",
    "stopping",
    "drive",
    "verify",
    "verify_loop",
    "vp",
]
