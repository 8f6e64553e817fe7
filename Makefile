# Two commands: `make quickstart` and `make test`. Each makes its own virtual environment, and is safe to run again.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python
RUNS ?= runs
export OMP_NUM_THREADS ?= 1

.PHONY: help install quickstart test nightly lint bench clean

help:
	@echo "make quickstart   a first sweep on packaged data: offline after installation, minutes on two cores"
	@echo "make test         lint, types, tests"
	@echo "make nightly      the tests that make test leaves out, too"
	@echo "make bench        every comparison of docs/performance.md, anew: about three hours on two cores"

$(VENV)/.quickstart: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none was found."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.quickstart
	$(PY) -m pip install --quiet --editable '.[test]'
	@touch $@

install: $(VENV)/.quickstart

quickstart: install
	@if [ -e $(RUNS)/quickstart/sweep.yaml ]; then $(PY) -m orchestrator resume $(RUNS)/quickstart; \
	else $(PY) -m orchestrator sweep search_spaces/quickstart.yaml --storage $(RUNS); fi
	@echo; $(PY) -m orchestrator best $(RUNS)/quickstart
	@rm -rf exported
	@echo; $(PY) -m orchestrator export $(RUNS)/quickstart exported

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(call both,and not slow)

nightly: lint
	$(call both,)

# In two processes; first the tests without a cluster, then those that start one.
define both
	@failed=0; \
	$(PY) -m pytest --numprocesses 2 --dist loadfile -m "not ray $(1)" || failed=1; \
	$(PY) -m pytest --numprocesses 2 --dist loadfile -m "ray $(1)" $$(grep -rl --include='test_*.py' 'mark\.ray' tests) || failed=1; \
	exit $$failed
endef

$(VENV)/.bench: $(VENV)/.test
	$(PY) -m pip install --quiet --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench quickstart
	@echo "Three hours on two quiet cores; each line can be run alone, and none needs another."
	$(PY) -m benchmarks.search_cost --storage $(RUNS)
	$(PY) -m benchmarks.search_cost --storage $(RUNS) --task icons
	$(PY) -m benchmarks.search_cost --storage $(RUNS) --task icons --repeats 3
	$(PY) -m benchmarks.search_cost --storage $(RUNS) --task clipart_cnn
	$(PY) -m benchmarks.search_cost --storage $(RUNS) --task clipart_cnn --repeats 3
	$(PY) -m benchmarks.search_ranges
	$(PY) -m benchmarks.views --storage $(RUNS)
	$(PY) -m benchmarks.precision --storage $(RUNS)
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.sweep_against_plain
	$(PY) -m benchmarks.sweep_against_plain --steps 120 --trials 24 --block sweep_against_plain_shorter
	$(PY) -m benchmarks.sweep_against_torchdistill
	$(PY) -m benchmarks.streaming
	$(PY) -m benchmarks.scale
	$(PY) -m benchmarks.driver
	$(PY) -m benchmarks.groups
	$(PY) -m benchmarks.layout
	$(PY) -m benchmarks.compiled
	$(PY) -m benchmarks.profile
	$(PY) -m benchmarks.commands $(RUNS)/quickstart

clean:
	rm -rf $(VENV) $(RUNS) exported build *.egg-info
