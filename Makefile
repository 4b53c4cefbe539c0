# setup  everything to run and to develop      test   the fast tests
# run    a night: make run ARGS="--preset cpu"  lint   ruff, mypy --strict
# bench  one measurement: make bench NAME=...   clean  what the tools left; runs/ stays
# lock   write the lock files again from pyproject.toml
#
# Each target first does the set-up that it needs, in .venv, and does it once: a stamp file says that it is done.

VENV := .venv
TORCH := 2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
NEWER := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEWER)' 2>/dev/null && echo $$p && break; done || true)

# pip compiles with one process, and the packages' own tests too: half of its time. This one takes all cores. It must
# be done at set-up: the box sees the environment read-only, so each run would compile again what was left out.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib

# Files of tests go to a process a core, at most four: a test may use a second core itself.
SHARE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup run test lint bench clean lock
.DEFAULT_GOAL := setup

setup: $(VENV)/.stamp-dev

run: $(VENV)/.stamp-run
	@$(BIN)/ratchet run $(ARGS)

test: $(VENV)/.stamp-dev
	@$(BIN)/python -m pytest -q $(SHARE) -m "not slow and not gpu and not model and not ray and not slurm" $(ARGS)

lint: $(VENV)/.stamp-dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/.stamp-run
	@test -n "$(NAME)" || { echo 'make bench: say which one: make bench NAME=... ("ratchet bench --help" lists them).'; exit 1; }
	@$(BIN)/ratchet bench $(NAME) $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find agent sandbox target_repo tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is held at the release whose results docs/ reports; the local label of a CPU build is no part of the pin.
lock: $(VENV)/.stamp-dev
	@$(PIP) install 'pip-tools>=7.5'
	@$(call freeze,requirements.lock,-P torch==$(TORCH))
	@$(call freeze,requirements-dev.lock,--extra dev -c requirements.lock)

# An environment whose interpreter is gone or that was left half made is made again.
$(VENV)/.stamp-run: requirements.lock pyproject.toml
	@$(call environment,requirements.lock)
	@touch $@

# The development lock holds the runtime lock, so this one install serves both stamps.
$(VENV)/.stamp-dev: requirements-dev.lock requirements.lock pyproject.toml
	@$(call environment,requirements-dev.lock)
	@touch $(VENV)/.stamp-run $@

define environment
'$(PYTHON)' -c '$(NEWER)' 2>/dev/null || { echo 'make: Ratchet needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...'; exit 1; }; \
$(BIN)/python -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear $(VENV) || exit 1; \
echo 'Installing $(1) into $(VENV): a minute or two, once ...'; \
$(PIP) install --no-compile -r $(1) && $(PIP) install --no-deps --editable . && { $(COMPILE) || true; }
endef

define freeze
$(BIN)/pip-compile --quiet --no-header --no-annotate --strip-extras --allow-unsafe --no-emit-index-url \
	--no-emit-find-links --no-emit-trusted-host --no-emit-options $(2) --output-file $(1).new pyproject.toml && \
{ echo '# Written by "make lock" from pyproject.toml; do not edit.'; sed -e 's/+cpu//' -e '/^#/d' -e '/^$$/d' $(1).new; } \
	> $(1) && rm $(1).new
endef
