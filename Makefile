# `make sample` and `make test` set everything up by themselves.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3

DEVICE ?= cuda

.PHONY: sample test wheel release oldest newest mutants soak faults trust lint matrix gpu figures options docs demo format clean

$(READY): pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
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

# The wheel, installed outside of the checkout and run from there.
wheel: $(READY)
	.ci/wheel

# A release: its version, its changes, its files in dist/, checked. What is left is to commit, tag and upload them.
release: $(READY)
	test -n "$(VERSION)" || { echo "make release VERSION=0.2.0"; exit 1; }
	$(BIN)/hatchling version $(VERSION)
	$(BIN)/towncrier build --yes --version $(VERSION)
	rm -rf dist && $(BIN)/python -m build && $(BIN)/twine check --strict dist/*

# The oldest supported versions and the newest ones, each in an environment of its own.
VERSIONED := tests/samplers tests/solvers tests/engine tests/loops/test_function.py tests/loops/test_one_pass.py \
	tests/loops/test_solver.py tests/test_sample.py tests/test_stream.py tests/test_files.py
oldest newest: .ci/oldest.txt pyproject.toml
	test -x .venv-$@/bin/python || $(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(if $(filter oldest,$@),--constraint .ci/oldest.txt) \
		--editable '.[models]' pytest hypothesis scipy
	OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest -q $(VERSIONED)
	.venv-$@/bin/python .ci/versions $@ $(VERSIONED)

# Break each mechanism once; fault each rank; a thousand samples; more examples of the laws. All but the soak go on
# where they stopped; `trust` writes docs/trust.md from their tables.
mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

soak: $(READY)
	$(BIN)/python benchmarks/soak.py

trust: $(READY)
	$(BIN)/python benchmarks/trust.py

# Every pair of the registry on more problems than `make test` takes, every option of every pipeline, and 500 loops at
# random; all go on where they stopped.
matrix: $(READY)
	$(BIN)/python benchmarks/matrix.py
	PARATAXIS_EXAMPLES=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/solvers/test_hard_laws.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pipelines.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loops_at_random.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/properties.py

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
