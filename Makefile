# The two commands of the README are `make demo` and `make test`; both make .venv first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
SHELL := /bin/bash
PYTEST := $(BIN)/python -m pytest -q --reruns 2 --reruns-delay 1

.PHONY: venv demo test test-fast test-full test-oldest test-rdma servers check bench clean

venv: $(STAMP)

# A .venv of another Python, or one whose making was interrupted, is made anew; any other is kept.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "wukong needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@wanted="$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')"; \
	found="$$($(BIN)/python -c 'import pip, sys; print(sys.version_info[:2])' 2>/dev/null)"; \
	if [ "$$wanted" != "$$found" ]; then $(PYTHON) -m venv --clear .venv; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: venv
	$(BIN)/wukong demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that need an RDMA device come last: the guest kernel which has one is built meanwhile, the
# first time, on processors that the other tests leave idle.
test: check servers
	$(BIN)/python -m tests.rdma_guest --after '$(PYTEST) -m "not slow"' --after '$(PYTEST) -m slow'

# What needs an RDMA device, in a guest kernel that has one; builds that kernel once.
test-rdma: venv
	$(BIN)/python -m tests.rdma_guest

# Servers that tests start themselves; installed where this is root on Debian, else tests skip.
servers:
	@path="$$PATH:/usr/sbin:/sbin"; missing=""; \
	for pair in redis-server:redis-server openssl:openssl slurmctld:slurm-wlm munged:munge; do \
		PATH="$$path" command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; \
	done; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
		--no-install-recommends $$missing >/dev/null; } \
		|| echo "missing:$$missing; what needs them is skipped"

test-fast: venv
	$(BIN)/python -m pytest -q -m "not slow"

test-full: check servers test-oldest
	$(BIN)/python -m pytest -q --full
	$(BIN)/python -m tests.dask_suites --full

# Clients of the oldest Dask that is taken; its environment is made once, and when this changes.
OLDEST := $(shell sed -n 's/^OLDEST = "\(.*\)"/\1/p' wukong/scheduler/dask_server_clients.py)
OLD := .venv-$(OLDEST)

test-oldest: $(OLD)/.stamp
	PYTHONPATH=$(CURDIR) $(OLD)/bin/python -m pytest -q tests/dask tests/test_dask_server.py

$(OLD)/.stamp: pyproject.toml
	$(PYTHON) -m venv --clear $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[redis]' \
		dask==$(OLDEST) distributed==$(OLDEST) hypothesis pandas psutil pyarrow 'pytest>=9' \
		pytest-rerunfailures
	@touch $@

bench: venv
	$(BIN)/wukong bench micro
	$(BIN)/wukong bench linalg
	$(BIN)/wukong bench limits

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis bench/results
	find wukong bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
