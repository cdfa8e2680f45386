# The two commands of the README and what surrounds them. Everything happens in .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slurm test-cluster check bench clean

# A small array of runs on this machine, from submission to figures. Its results go to runs/results, so that those in
# results/, which came with the project, stay as they are.
run: .venv/run
	@$(BIN)/python -m jobs submit parameter_testing --grid demo --cluster local --results runs/results
	@$(BIN)/python -m jobs status parameter_testing --grid demo --watch --results runs/results
	@$(BIN)/python -m plots parameter_testing --results runs/results

test: .venv/dev
	$(BIN)/python -m pytest

# The life of an array and its faults on a real SLURM of one node; installs Debian's packages first (root or sudo).
test-slurm: .venv/dev
	$(BIN)/python tests/cluster/one_node_slurm.py install
	$(BIN)/python -m pytest tests/cluster

# The life of an array on the cluster you are logged in to, as in: make test-cluster CLUSTER=dtu-cpu
test-cluster: .venv/dev
	BATCHENS_TEST_CLUSTER=$(CLUSTER) $(BIN)/python -m pytest tests/cluster/test_story.py --basetemp=runs/test-cluster

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/run
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.averaging
	$(BIN)/python -m benchmarks.scale

.venv/run: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
