"""Memory of a long loop is bounded by its window: what belongs to other steps is in a file."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import parataxis as px
from loop_problems import relative
from parataxis.loops import speculation, spool
from parataxis.loops.spool import Spool
from parataxis.parallel import parallel

DIM = 1 << 14  # 64 kB a state
STATE = 4 * DIM


class Alive(TorchDispatchMode):
    """The bytes of tensors that are alive at once; those of files are no memory that anything waits for."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.hold(value.untyped_storage())
        return result

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not storage.resizable():  # those of a mapped file cannot be resized
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.bytes -= size


class Denoiser(nn.Module):
    def forward(self, x, t):
        return 0.5 * x + 0.1 * torch.tanh(x * t.reshape(-1, 1) / 1000)


def make(steps, kind):
    net = Denoiser()

    def loop(x):
        for i in range(steps):
            x = x - (1.5 / steps) * net(x, torch.tensor(1000.0 * (steps - i) / steps))
            if kind == "noise":
                x = x + 0.01 * torch.randn(x.shape)
            if kind == "clipped":
                x = x.clamp(-2.5, 2.5)
        return x

    return net, loop


@pytest.fixture
def little_memory(monkeypatch):
    if not spool.CAN_MAP:
        pytest.skip("files cannot be mapped, so everything stays in memory")
    monkeypatch.setattr(Spool.__init__, "__defaults__", (4 * STATE,))


@pytest.mark.parametrize("kind", ["noise", "clipped"])
def test_peak_memory_does_not_grow_with_the_number_of_steps(kind, little_memory):
    x = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))
    peaks = []
    for steps in (16, 32):
        net, loop = make(steps, kind)
        torch.manual_seed(0)
        expected = loop(x)
        torch.manual_seed(0)
        run = parallel(loop, px.Secant(window=4), denoisers=[net])
        with Alive() as alive, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*slower.*")
            result = run(x)
        assert run.report.mode == ("replay" if kind == "clipped" else "recurrence")
        assert relative(result, expected) <= 1e-2
        peaks.append(alive.peak / STATE)
    assert peaks[1] <= peaks[0] + 6  # 16 more steps take a few states of memory at most, not ten each
    assert peaks[1] <= 88


def test_peak_memory_of_one_pass_is_that_of_its_window(monkeypatch):
    """Live tensors: what the allocator makes of them differs from run to run."""
    monkeypatch.setattr(speculation, "TOGETHER", DIM)  # as if states were large
    net, steps, peaks = Denoiser(), DDIMScheduler(clip_sample=False), []

    def loop(x, count):
        steps.set_timesteps(count)
        for t in steps.timesteps:
            x = steps.step(net(x, t.float()), t, x).prev_sample
        return x

    x = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))
    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    for count in (12, 40):
        with Alive() as alive:
            run(x, count)
        assert run.report.mode == "one pass"
        peaks.append(alive.peak / STATE)
    assert peaks[1] <= peaks[0] + 1
    assert peaks[1] <= 94


def test_kept_tensors_are_tensors_like_any_other():
    tensors = [torch.randn(3, DIM, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    place = Spool(in_memory=0)
    copies = [place.keep(tensor) for tensor in tensors]
    copies[3] += 1
    stacked = place.stack(copies, 1)
    assert all(map(torch.equal, copies[4:], tensors[4:]))
    assert torch.equal(copies[3], tensors[3] + 1)
    assert torch.equal(stacked, torch.stack(copies, 1))
    assert copies[0].data_ptr() != place.copy(copies[0]).data_ptr()


def test_small_tensors_and_the_first_ones_stay_in_memory():
    place, x = Spool(in_memory=STATE), torch.zeros(DIM)
    assert place.keep(x) is x
    assert place.keep(x[:16]).data_ptr() == x.data_ptr()
    if spool.CAN_MAP:
        assert place.keep(x) is not x


def test_files_go_with_their_tensors():
    if not spool.CAN_MAP:
        pytest.skip("files cannot be mapped")
    place = Spool(in_memory=0)
    copies = [place.keep(torch.zeros(DIM))]
    chunk = spool._MAPPED.chunks[-1]
    del place, copies
    gc.collect()
    assert chunk() is None


def test_full_disk_means_memory(monkeypatch):
    def no_room(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(spool.os, "posix_fallocate", no_room, raising=False)
    place, x = Spool(in_memory=0), torch.zeros(DIM)
    assert place.keep(x) is x
