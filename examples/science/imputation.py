"""Imputation of time series: PyPOTS' CSDI, unmodified, through ``px.parallel``.

Run it in an environment of its own, as PyPOTS asks for older versions of other packages: ``pip install parataxis
pypots``, then ``python examples/science/imputation.py``. It trains a small CSDI on sine waves of which a fifth of the
values are missing, some ten seconds of the CPU, and imputes one series with two samples, drawn one after the other in
50 steps each: both are solved in parallel.

On one core it is slower than the loop, and says so: the network is small, its attention grows with every row, and this
loop is replayed in every round, as missing values lie scattered over the series. It is here because the result is the
same, whatever the loop does with its masks; on a CPU draw the samples of all series in one batch.
"""

import time
import warnings

import numpy as np
import torch
from pypots.imputation import CSDI

import parataxis as px

warnings.filterwarnings("ignore", "running in parallel was slower", RuntimeWarning)
torch.set_num_threads(1)
torch.manual_seed(0)
random, hours = np.random.default_rng(0), np.arange(24)
waves = [np.sin(hours[:, None] * random.uniform(0.2, 0.6) + random.uniform(0, 6, 4)) for _ in range(128)]
series = np.stack(waves).astype(np.float32)
series[random.random(series.shape) < 0.2] = np.nan

model = CSDI(
    n_steps=24,
    n_features=4,
    n_layers=2,
    n_heads=2,
    n_channels=16,
    d_time_embedding=16,
    d_feature_embedding=8,
    d_diffusion_embedding=32,
    n_diffusion_steps=50,
    epochs=10,
    device="cpu",
    verbose=False,
)
model.fit({"X": series})


def impute(samples: int) -> np.ndarray:
    """Fill in the missing values of the first series, so many times."""
    torch.manual_seed(0)
    return np.asarray(model.predict({"X": series[:1]}, n_sampling_times=samples)["imputation"])


parallel = px.parallel(impute, px.Secant(window=16), denoisers=[model.model.backbone.diff_model])
impute(2)
parallel(2)
begin = time.perf_counter()
expected = impute(2)
middle = time.perf_counter()
found = parallel(2)
end = time.perf_counter()
error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
print(f"CSDI's loop: {1e3 * (middle - begin):.0f} ms, 100 evaluations one after the other")
print(f"in parallel: {1e3 * (end - middle):.0f} ms, {parallel.report.rounds} rounds, relative error {error:.0e}")
print(parallel.report)
