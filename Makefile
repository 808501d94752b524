# `make sample` and `make test` set everything up by themselves.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3

DEVICE ?= cuda

.PHONY: sample test lint matrix gpu figures options docs demo format clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# A robot's plans and a digit, both ways: seconds, speed-up and error; figures and pictures in out/.
sample: $(READY)
	$(BIN)/python examples/first_minute.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every pair of the registry on more problems than `make test` takes, every option of every pipeline, and 500 loops at
# random; all go on where they stopped.
matrix: $(READY)
	$(BIN)/python benchmarks/matrix.py
	PARATAXIS_EXAMPLES=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/solvers/test_hard_laws.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pipelines.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loops_at_random.py

# Sets nothing up: it takes the Python that has torch, as on a machine without a network. DEVICE=cpu is a dry run.
gpu:
	PYTHONPATH=src:$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --device $(DEVICE) $(OPTIONS)

figures: $(READY)
	$(BIN)/python benchmarks/figures.py

# The command line's flags, from the options of solvers and samplers.
options: $(READY)
	$(BIN)/python -c 'from parataxis.cli.options import write; write()'

# Without a network, and with warnings as errors.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

demo: $(READY)
	$(BIN)/parataxis demo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out dist
