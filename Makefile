# `make demo` shows the main job, `make test` runs the tests, `make check` what CI runs before them. Each makes .venv by itself when needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow check format bench chaos clean fuzz audit

demo: $(STAMP)
	$(BIN)/crossdock demo

# One thread a rank: the tests start several ranks at once, and the default of one thread a core makes them fight.
test test-slow: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Twenty thousand broken files of every kind; the tests read a thousand.
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),20000) --seed $(or $(SEED),1)

audit: $(STAMP)
	$(BIN)/python .ci/audit.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.layer --short
	$(BIN)/python -m benchmarks.overlap --short
	$(BIN)/python -m benchmarks.losses --short

# Long: 200 SIGKILLs, 1,000 damaged checkpoints and every other fault, in one table; less than an hour on four idle cores, and root for
# emulated hosts. `make chaos RESUME=1` goes on with one that was cut off. `python -m benchmarks.chaos --short` is the short form.
chaos: $(STAMP)
	$(BIN)/python -m benchmarks.chaos --out $(or $(OUT),runs/chaos/faults.json) $(if $(RESUME),--resume)

# uv installs several times faster than pip; it is used when it can be had. It does not read pip's settings, hence the find-links.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Crossdock needs Python 3.11 or newer, and $(PYTHON) is older; choose one: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: install your system's package for venv (python3-venv)"; exit 1; }
	@echo "installing into $(VENV)"
	@$(BIN)/pip install --quiet uv 2>/dev/null || true
	@set -f; set -- $${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/pip config get global.find-links 2>/dev/null)}}; \
	export UV_FIND_LINKS="$$*"; \
	if [ -z "$$UV_FIND_LINKS" ]; then unset UV_FIND_LINKS; fi; \
	{ test -x $(BIN)/uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; } || \
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
