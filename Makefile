# `make demo` and `make test` set up everything they need in .venv: the demo only what the package
# needs, the tests also the optional packages, the tools of development and a browser.
# A plain torch from PyPI brings gigabytes of CUDA libraries on Linux; for a CPU-only machine put
# PyTorch's CPU package index in PIP_EXTRA_INDEX_URL first.

PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling all that is installed takes longer than the demo.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all follow upstream lint bench docs site notebooks agents mini clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/qsl demo

# One file of tests stays on one core. `make test TESTS=tests/test_rank.py` runs one.
# `make test-all` adds the few tests marked slow, such as a Ray cluster whose worker is killed, and
# what only these need.
TESTS ?= -m "not slow"
test-all: TESTS :=
test test-all: export OMP_NUM_THREADS ?= 1
test-all: .venv/bucket-tests
test test-all: .venv/ready
	$(BIN)/python -m tools.browser
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

# Upstream's own tests on our bridge, fetched by version into build/upstream: minutes, see docs/models.md.
upstream: .venv/ready
	$(BIN)/python -m tools.upstream.suites

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

# The README, every page in docs/ and every help text, followed from a clone as a reader would.
follow: .venv/ready
	$(BIN)/python -m tools.docs.follow --clone --jobs 2

# The same on this checkout; what the blocks print is written into the pages.
docs: .venv/ready
	$(BIN)/python -m tools.docs.follow --warm --write

# The documentation as a site for any static host, in build/site. A dead link fails it.
site: .venv/ready
	$(BIN)/python -m tools.site.live --out build/live
	$(BIN)/python -m mkdocs build --strict --quiet

# Every notebook in examples/, in an empty folder; what its cells show is written into it.
notebooks: .venv/ready
	$(BIN)/python -m tools.notebooks

# What agents read first: llms.txt and AGENTS.md, made from the README, the docs and the doors.
agents: .venv/ready
	$(BIN)/python -m tools.docs.agents

# Everything from nothing, for hours; each step goes on where it was interrupted. The texts come
# from Debian packages, so this needs `apt-get` with package lists. glibc keeps freed memory here:
# giving it back after every step of training costs a fifth of the time in page faults.
mini: export MALLOC_MMAP_THRESHOLD_ = 4000000000
mini: export MALLOC_TRIM_THRESHOLD_ = 8000000000
mini: .venv/ready
	set -e; for step in corpus tokenizer "model mini-qwen3" "model mini-qwen3.5" \
	    "sae mini-qwen3" "sae mini-qwen3.5" release panel; do \
	  $(BIN)/python -m tools.mini.$$step --work build/mini; done
	$(BIN)/python benchmarks/mini.py --work build/mini --card

# setuptools and torch come first: the package is built without an environment of its own, and torch
# keeps the build that is there.
.venv/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools torch
	touch $@

.venv/installed: .venv/torch pyproject.toml constraints.txt
	$(PIP) --no-build-isolation --editable .
	touch $@

.venv/ready: .venv/torch pyproject.toml constraints.txt
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch .venv/installed $@

.venv/bucket-tests: .venv/ready
	$(PIP) --no-build-isolation --editable ".[dev,bucket-tests]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
