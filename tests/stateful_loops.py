"""Loops that keep state, as people's code does: each makes a function, and a look at everything that it leaves behind.

A maker takes the network and returns ``(function, look)``; ``function()`` draws a sample, ``look()`` returns the state
in plain values, lists and tensors.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import io
import itertools
import queue
import random
import types

import numpy as np
import torch
from torch import nn

DIM, STEPS = 16, 10


class Net(nn.Module):
    """A smooth small network, whose attribute ``gain`` scales its output."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5, requires_grad=False)
        self.register_buffer("shift", torch.zeros(DIM))
        self.gain = 1.0

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        return self.gain * torch.tanh(x @ self.weight + torch.sin(3 * t) + self.shift)


def start(seed=0):
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed))


def descend(net, x, each=lambda i, x: x, before=lambda i, x: None):
    """The loop of all of them; ``each`` may look at every state and change it."""
    for i in range(STEPS):
        before(i, x)
        x = each(i, x + 0.2 * (net(x, 1 - i / STEPS) - x))
    return x


MAKERS = {}


def maker(function):
    MAKERS[function.__name__.strip("_").replace("_", " ")] = function
    return function


# -- what a container holds -------------------------------------------------------------------------------------------


def keeps(name, make, put, content=list):
    """Every state's mean goes into a container, which also says where the next call begins."""

    def function(net):
        held = make()

        def loop():
            def each(i, x):
                put(held, float(x.mean()))
                return x

            return descend(net, start() * (1 + 0.01 * len(content(held))), each)

        return loop, lambda: content(held)

    MAKERS[name] = function


def put_in_set(held, value):
    held.add(round(value, 1))


def put_in_dict(held, value):
    held[len(held)] = value


def put_in_buffer(held, value):
    held.append(int(abs(value) * 100) % 256)


def put_in_queue(held, value):
    held.put(value)


keeps("list", list, list.append)
keeps("deque", collections.deque, collections.deque.append)
keeps("deque with a length", lambda: collections.deque(maxlen=7), collections.deque.append)
keeps("dict", dict, put_in_dict, lambda held: list(held.items()))
keeps("ordered dict", collections.OrderedDict, put_in_dict, lambda held: list(held.items()))
keeps("default dict", lambda: collections.defaultdict(float), put_in_dict, lambda held: list(held.items()))
keeps("set", set, put_in_set, sorted)
keeps("bytes", bytearray, put_in_buffer)
keeps("array of numbers", lambda: array.array("d"), array.array.append)
keeps("queue", queue.Queue, put_in_queue, lambda held: list(held.queue))
keeps("text in memory", io.StringIO, lambda held, value: held.write("x"), lambda held: list(held.getvalue()))
keeps("user list", collections.UserList, lambda held, value: held.append(value))
keeps("list in a list", lambda: [[]], lambda held, value: held[0].append(value), lambda held: held[0])
keeps("list in a tuple", lambda: ([], 1), lambda held, value: held[0].append(value), lambda held: held[0])
keeps(
    "list in a namespace",
    lambda: types.SimpleNamespace(values=[]),
    lambda held, value: held.values.append(value),
    lambda held: held.values,
)


@dataclasses.dataclass
class Record:
    values: list = dataclasses.field(default_factory=list)
    count: int = 0


class Slotted:
    __slots__ = ("count", "values")

    def __init__(self):
        self.values, self.count = [], 0


class Shared:
    values: list = []  # noqa: RUF012  # as people write it
    count = 0


def put_in_record(held, value):
    held.values.append(value)
    held.count += 1


def content_of_record(held):
    return [*held.values, held.count]


keeps("data class", Record, put_in_record, content_of_record)
keeps("slots", Slotted, put_in_record, content_of_record)


@maker
def class_attributes(net):
    Shared.values, Shared.count = [], 0

    def loop():
        def each(i, x):
            put_in_record(Shared, float(x.mean()))
            return x

        return descend(net, start() * (1 + 0.01 * Shared.count), each)

    return loop, lambda: content_of_record(Shared)


# -- counters ---------------------------------------------------------------------------------------------------------

CALLS = 0


@maker
def nonlocal_counter(net):
    count = 0

    def loop():
        nonlocal count
        count += 1
        return descend(net, start(count))

    return loop, lambda: count


@maker
def global_counter(net):
    globals()["CALLS"] = 0

    def loop():
        global CALLS
        CALLS += 1
        return descend(net, start(CALLS))

    return loop, lambda: CALLS


@maker
def counter_on_self(net):
    class Policy:
        count = 0

        def act(self):
            self.count += 1
            return descend(net, start(self.count))

    policy = Policy()
    return policy.act, lambda: policy.count


@maker
def counter_of_steps_on_self(net):
    class Policy:
        step = 0

        def each(self, i, x):
            self.step += 1
            return x * (1 + 0.001 * self.step)

        def act(self):
            return descend(net, start(), self.each)

    policy = Policy()
    return policy.act, lambda: policy.step


@maker
def counter_in_a_tensor(net):
    count = torch.zeros((), dtype=torch.int64)

    def loop():
        count.add_(1)
        return descend(net, start(int(count)))

    return loop, lambda: int(count)


@maker
def counter_in_an_array(net):
    count = np.zeros(1, int)

    def loop():
        count[0] += 1
        return descend(net, start(int(count[0])))

    return loop, lambda: int(count[0])


@maker
def function_attribute(net):
    def loop():
        loop.count += 1
        return descend(net, start(loop.count))

    loop.count = 0
    return loop, lambda: loop.count


@maker
def default_argument(net):
    def loop(seen=[]):  # noqa: B006  # as people write it
        seen.append(1)
        return descend(net, start(len(seen)))

    return loop, lambda: list(loop.__defaults__[0])


@maker
def partial_argument(net):
    def draw(seen):
        seen.append(1)
        return descend(net, start(len(seen)))

    loop = functools.partial(draw, [])
    return loop, lambda: list(loop.args[0])


@maker
def counter_of_a_helper(net):
    state = {"n": 0}

    def next_seed():
        state["n"] += 1
        return state["n"]

    return lambda: descend(net, start(next_seed())), lambda: state["n"]


@maker
def counter_behind_a_decorator(net):
    state = {"n": 0}

    @torch.no_grad()
    def loop():
        state["n"] += 1
        return descend(net, start(state["n"]))

    return loop, lambda: state["n"]


# -- arrays and tensors -----------------------------------------------------------------------------------------------


def written(name, write):
    """A tensor of the start is written to in place."""

    def function(net):
        x = start()

        def loop():
            return descend(net, write(x))

        return loop, lambda: x.clone()

    MAKERS[name] = function


def write_slice(x):
    x[:, :4] = x[:, :4] * 0.9
    return x


def write_memory(x):
    x.data.mul_(0.9)
    return x


def write_array(x):
    x.numpy()[...] *= 0.9
    return x


def write_item(x):
    x[0, 0] += 0.1
    return x


written("tensor in place", lambda x: x.mul_(0.9))
written("tensor by operator", lambda x: x.__imul__(0.9))
written("slice in place", write_slice)
written("item in place", write_item)
written("memory of a tensor", write_memory)
written("array of a tensor", write_array)
written("tensor copied over", lambda x: x.copy_(x * 0.9))
written("tensor by out", lambda x: torch.mul(x, 0.9, out=x))


@maker
def observation_normalised_in_place(net):
    observation = np.random.default_rng(0).normal(size=(2, DIM)).astype(np.float32) * 3

    def loop():
        observation[...] = (observation - observation.mean()) / (observation.std() + 0.5)
        return descend(net, torch.from_numpy(observation.copy()))

    return loop, lambda: observation.copy()


@maker
def state_in_place_at_every_step(net):
    def loop():
        x = start()

        def each(i, new):
            x.copy_(new)
            return x

        return descend(net, x, each)

    return loop, lambda: None


@maker
def moving_average(net):
    average = torch.zeros(2, DIM)

    def each(i, x):
        average.mul_(0.9).add_(x, alpha=0.1)
        return x + 0.01 * average

    return lambda: descend(net, start(), each), lambda: average.clone()


@maker
def momentum_kept_between_calls(net):
    state = {"velocity": torch.zeros(2, DIM)}

    def each(i, x):
        state["velocity"] = 0.5 * state["velocity"] + 0.05 * x
        return x - state["velocity"]

    return lambda: descend(net, start(), each), lambda: state["velocity"]


@maker
def result_of_the_call_before(net):
    kept = [start()]

    def loop():
        kept[0] = descend(net, 0.5 * kept[0] + start())
        return kept[0]

    return loop, lambda: kept[0]


@maker
def history_of_tensors(net):
    states = []

    def each(i, x):
        states.append(x.clone())
        return x

    return lambda: descend(net, start() * (1 + 0.001 * len(states)), each), lambda: list(states)


@maker
def gradient_is_kept(net):
    x = start().requires_grad_()

    def loop():
        (x * x).sum().backward()
        with torch.no_grad():
            return descend(net, x - 0.01 * x.grad)

    return loop, lambda: x.grad.clone()


@maker
def row_of_a_larger_tensor(net):
    memory = torch.zeros(5, 2, DIM)

    def loop():
        memory[1:] = memory[:-1].clone()
        memory[0] = descend(net, start() + 0.1 * memory[1])
        return memory[0].clone()

    return loop, lambda: memory.clone()


@maker
def large_memory(net):
    memory = torch.zeros(1 << 21)

    def loop():
        memory.add_(1)
        return descend(net, start(int(memory[0])))

    return loop, lambda: float(memory[-1])


# -- random numbers ---------------------------------------------------------------------------------------------------


def draws(name, make, draw, state):
    """Noise at every step comes from a generator."""

    def function(net):
        source = make()

        def each(i, x):
            return x + 0.02 * torch.as_tensor(draw(source), dtype=torch.float32)

        return lambda: descend(net, start(), each), lambda: state(source)

    MAKERS[name] = function


SHAPE = (2, DIM)
draws(
    "generator of torch",
    lambda: torch.Generator().manual_seed(1),
    lambda source: torch.randn(SHAPE, generator=source),
    lambda source: source.get_state(),
)
draws(
    "generator of numpy",
    lambda: np.random.default_rng(1),
    lambda source: source.normal(size=SHAPE),
    lambda source: source.bit_generator.state["state"]["state"],
)
draws(
    "old generator of numpy",
    lambda: np.random.RandomState(1),  # as people write it
    lambda source: source.normal(size=SHAPE),
    lambda source: source.get_state()[2],
)
draws(
    "generator of python",
    lambda: random.Random(1),
    lambda source: [[source.gauss(0, 1) for _ in range(DIM)] for _ in range(2)],
    lambda source: source.random.__self__.getstate()[1][-1],
)
draws(
    "global generators",
    lambda: torch.manual_seed(1),
    lambda source: torch.randn(SHAPE) + random.random() + np.random.rand(),  # noqa: NPY002  # as people write it
    lambda source: torch.get_rng_state(),
)


@maker
def noise_from_a_list(net):
    noises = [torch.randn(2, DIM, generator=torch.Generator().manual_seed(i)) for i in range(100)]

    def each(i, x):
        return x + 0.02 * noises.pop()

    return lambda: descend(net, start(), each), lambda: len(noises)


@maker
def noise_by_a_counter(net):
    count = [0]

    def each(i, x):
        count[0] += 1
        return x + 0.02 * torch.sin(torch.arange(DIM) * count[0])

    return lambda: descend(net, start(), each), lambda: count[0]


@maker
def noise_from_an_iterator(net):
    noises = itertools.count(1)

    def each(i, x):
        return x + 0.02 * torch.sin(torch.arange(DIM) * next(noises))

    return lambda: descend(net, start(), each), lambda: repr(noises)


@maker
def noise_from_a_generator_function(net):
    noises = (torch.full((DIM,), 0.01 * k) for k in range(1000))

    def each(i, x):
        return x + 0.02 * next(noises)

    return lambda: descend(net, start(), each), lambda: None


# -- queues of actions ------------------------------------------------------------------------------------------------


@maker
def queue_of_actions(net):
    class Policy:
        def __init__(self):
            self.actions = collections.deque()
            self.calls = 0

        def select(self):
            self.calls += 1
            if not self.actions:
                self.actions.extend(descend(net, start(self.calls)).unbind(0))
            return self.actions.popleft()

    policy = Policy()
    return policy.select, lambda: (policy.calls, list(policy.actions))


@maker
def queue_that_is_an_argument(net):
    jobs = [3, 1, 4, 1, 5, 9]
    loop = functools.partial(lambda jobs: descend(net, start(jobs.pop())), jobs)
    return loop, lambda: list(jobs)


@maker
def cache_by_key(net):
    cache = {}

    def loop():
        key = len(cache)
        if key not in cache:
            cache[key] = descend(net, start(key))
        return cache[key]

    return loop, lambda: cache


# -- a scheduler of one's own -----------------------------------------------------------------------------------------


@maker
def step_index_of_a_scheduler(net):
    class Scheduler:
        index = None

        def step(self, output, x):
            self.index = 0 if self.index is None else self.index + 1
            return x + 0.2 * (1 + 0.01 * self.index) * (output - x)

    scheduler = Scheduler()

    def loop():
        x = start()
        for i in range(STEPS):
            x = scheduler.step(net(x, 1 - i / STEPS), x)
        return x

    return loop, lambda: scheduler.index


@maker
def multistep_memory_of_a_scheduler(net):
    class Scheduler:
        def __init__(self):
            self.outputs = []

        def step(self, output, x):
            self.outputs.append(output)
            before = self.outputs[-2] if len(self.outputs) > 1 else output
            self.outputs = self.outputs[-3:]
            return x + 0.2 * (1.5 * output - 0.5 * before - x)

    scheduler = Scheduler()

    def loop():
        x = start()
        for i in range(STEPS):
            x = scheduler.step(net(x, 1 - i / STEPS), x)
        return x

    return loop, lambda: list(scheduler.outputs)


@maker
def timesteps_are_popped(net):
    class Scheduler:
        def set_timesteps(self):
            self.times = [1 - i / STEPS for i in range(STEPS)]

    scheduler = Scheduler()
    scheduler.set_timesteps()

    def loop():
        x = start()
        scheduler.set_timesteps()
        while scheduler.times:
            x = x + 0.2 * (net(x, scheduler.times.pop(0)) - x)
        return x

    return loop, lambda: list(scheduler.times)


# -- the network ------------------------------------------------------------------------------------------------------


@maker
def attribute_of_the_network_between_calls(net):
    def loop():
        net.gain = 0.9 * net.gain
        return descend(net, start())

    return loop, lambda: net.gain


@maker
def attribute_of_the_network_between_steps(net):
    def before(i, x):
        net.gain = 1.0 if i < STEPS // 2 else 0.5

    return lambda: descend(net, start(), before=before), lambda: net.gain


@maker
def weights_scaled_between_calls(net):
    def loop():
        net.weight.mul_(0.95)
        return descend(net, start())

    return loop, lambda: net.weight.clone()


@maker
def weights_scaled_between_steps(net):
    def before(i, x):
        if i == STEPS // 2:
            net.weight.data.mul_(0.5)

    def loop():
        kept = net.weight.clone()
        x = descend(net, start(), before=before)
        net.weight.data.copy_(kept)
        return x

    return loop, lambda: net.weight.clone()


@maker
def buffer_between_steps(net):
    def before(i, x):
        net.shift.fill_(0.05 * i)

    return lambda: descend(net, start(), before=before), lambda: net.shift.clone()


@maker
def module_exchanged_between_steps(net):
    wide = nn.Sequential(nn.Linear(DIM, DIM))

    def before(i, x):
        net.extra = wide if i % 2 else None

    return lambda: descend(net, start(), before=before), lambda: net.extra is wide


@maker
def hook_added_between_steps(net):
    def loop():
        handles = []

        def before(i, x):
            if i == 5:
                handles.append(net.register_forward_hook(lambda module, args, output: output * 0.5))

        x = descend(net, start(), before=before)
        for handle in handles:
            handle.remove()
        return x

    return loop, lambda: len(net._forward_hooks)


@maker
def averaged_weights_and_back(net):
    average = {name: value * 0.9 for name, value in net.state_dict().items()}

    def loop():
        kept = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(average)
        x = descend(net, start())
        net.load_state_dict(kept)
        return x

    return loop, lambda: net.weight.clone()


@maker
def training_mode_and_back(net):
    net.train()

    def loop():
        net.eval()
        x = descend(net, start())
        net.train()
        return x

    return loop, lambda: net.training


@maker
def network_that_counts(net):
    net.calls, plain = 0, net.forward

    def forward(x, t):
        net.calls += 1
        return plain(x, t) * (1 + 0.05 * (net.calls > 4))

    net.forward = forward
    return lambda: descend(net, start()), lambda: net.calls


@maker
def hook_that_counts(net):
    state = {"calls": 0}

    def hook(module, args, output):
        state["calls"] += 1
        return output * (0.5 if state["calls"] > 4 else 1.0)

    net.register_forward_hook(hook)
    return lambda: descend(net, start()), lambda: state["calls"]


@maker
def closure_that_counts_in_a_part(net):
    calls, part = [0], nn.Identity()

    def forward(x):
        calls[0] += 1
        return x * (0.5 if calls[0] > 4 else 1.0)

    part.forward = forward
    net.part, plain = part, net.forward
    net.forward = lambda x, t: net.part(plain(x, t))
    return lambda: descend(net, start()), lambda: calls[0]


def make(name):
    """Return (network, function, look) of a loop."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # as people write it
    net = Net()
    return net, *MAKERS[name](net)
