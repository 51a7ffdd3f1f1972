# maskloss: everything runs in .venv, which make creates on first use. All you need is python3 and make.
#
#   PYTHON=python3.12   the interpreter used to create .venv
#   ARGS="..."          extra arguments for `make train`, `make test`, `make slow`, `make long` or `make gpu`
#   WORKERS=0           run tests in this process, not in one for each core (for a debugger)

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS   ?=
WORKERS ?= logical
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -qq --disable-pip-version-check --no-input --progress-bar off -c constraints.txt
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help
help: ## Show this help
	@printf '\n  \033[1mmaskloss\033[0m\n\n'
	@awk -F ':.*## ' '/^[a-z ]+:.*## / { printf "  \033[36mmake %-8s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  Extra arguments: make train ARGS="--help"\n\n'

# ---------------------------------------------------------------------------------------------------------------- tasks

.PHONY: train
train: $(VENV)/.train ## Train a small query model and write a report (maskloss train)
	@$(VENV)/bin/maskloss train $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## Run the tests and doctests
	@$(PYTEST) $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## Check formatting, lint, types, import layering, its picture, translations, and workflows
	@echo '· format' && $(VENV)/bin/ruff format --check .
	@echo '· lint'   && $(VENV)/bin/ruff check .
	@echo '· types'  && $(VENV)/bin/mypy
	@echo '· layers' && $(VENV)/bin/lint-imports --no-logo
	@echo '· picture of the house' && $(PY) scripts/house.py --check
	@echo '· translations' && $(PY) scripts/translations.py --check
	@echo '· workflows' && $(VENV)/bin/zizmor --offline --pedantic -q .github

.PHONY: fix
fix: $(VENV)/.dev ## Format the code and apply the linter's fixes
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

.PHONY: slow
slow: $(VENV)/.dev ## Run the slow tests (marked `slow`), and properties with more examples (marked `thorough`)
	@$(PYTEST) -m "slow or thorough" --hypothesis-profile thorough $(ARGS)

.PHONY: long
long: $(VENV)/.dev ## Run what takes longest: training several models, thousands of problems (tests marked `long`)
	@$(PYTEST) -m long $(ARGS)

.PHONY: bounds
bounds: $(VENV)/.dev ## Run the tests of the operations with bounds checks in the CPU kernels
	@NUMBA_BOUNDSCHECK=1 $(PYTEST) tests/ops -m "not gpu" $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.dev ## Drive the public API and its readers at random (ARGS="--examples 20000 --seed 1 --write docs/fuzz.json")
	@PYTHONPATH=tests nice -n 19 $(PY) -m fuzz $(ARGS)

.PHONY: mutants
mutants: $(VENV)/.dev ## Change the code at places drawn at random, and see that a test fails (ARGS="--sample 20 --only points")
	@nice -n 19 $(PY) scripts/mutants.py $(ARGS)

# In environments of their own, with what pip or uv chooses from the ranges of pyproject.toml.
.PHONY: oldest newest nightly
oldest: INSTALL := .venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --torch-backend cpu --resolution lowest-direct
newest: INSTALL := .venv-newest/bin/uv pip install -q --python .venv-newest/bin/python --torch-backend cpu
nightly: INSTALL := .venv-nightly/bin/uv pip install -q --python .venv-nightly/bin/python --prerelease allow --index https://download.pytorch.org/whl/nightly/cpu
oldest newest nightly: ## Run the tests with the oldest, newest or nightly versions of what maskloss needs
	@$(PYTHON) -m venv --clear .venv-$@ && .venv-$@/bin/python -m pip install -qq uv
	@$(INSTALL) -e '.[test]'
	@.venv-$@/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

.PHONY: gpu
gpu: $(VENV)/.dev ## On a machine with a GPU: its tests, races, and times, on a page in runs/gpu, within eight minutes
	@$(VENV)/bin/maskloss bench --verify --device cuda --out runs/gpu $(ARGS)

.PHONY: docs
docs: $(VENV)/.dev ## Build the documentation; warnings are errors
	@$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

.PHONY: build
build: $(VENV)/.dev ## Build the source distribution and the wheel into dist/
	@$(PY) -m hatchling build

.PHONY: clean
clean: ## Remove build artifacts; keep .venv and runs/
	@rm -rf build dist docs/_build docs/api/generated docs/gallery .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@rm -rf .coverage htmlcov
	@find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove build artifacts and environments
	@rm -rf $(VENV) .venv-oldest .venv-newest .venv-nightly

# ---------------------------------------------------------------------------------------------------------- environment
# Each step leaves a stamp, so a second call has nothing to do. An interrupted step leaves none and is repeated.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo 'The pinned toolchain needs Python 3.11 or later: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo '· creating $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo 'python3 has no venv module (Debian and Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@touch $@

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt
	@echo '· installing maskloss and its training dependencies (a few minutes the first time)'
	@$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo '· installing maskloss and its development tools (a few minutes the first time)'
	@$(PIP) -e '.[dev]'
	@touch $@
