# Everything in one command each, set-up included: make demo, make test. They need Python 3.11+ and make.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo_out
DEMO_ARGS ?=
TEST_ARGS ?=
QUICK = -n auto --dist loadfile -m "not slow and not peer and not network"
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
# pyenv puts names on the path that run nothing unless they are chosen: look into its folders first.
PYENV = $(subst $(eval) ,:,$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin))
RUN = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-from-scratch test quick lint types lowest versions clean venv demo-venv

help:
	@echo "make demo    make a small pretrained Mamba-2 ternary, export it to GGUF, prove it and run it (into $(DEMO_OUT)/)"
	@echo "make demo-from-scratch   the same, and train that Mamba-2 first"
	@echo "make test    ruff, mypy, then every test"
	@echo "make quick   the tests that are neither slow nor ask another program"
	@echo "make lint    ruff, and the contract of imports"
	@echo "make types   mypy over the packages that pyproject.toml names"
	@echo "make lowest  the quick tests with the lowest versions that pyproject.toml allows (into $(VENV)-lowest/)"
	@echo "make versions  the quick tests with every Python of $(PYTHONS) that is here (into $(VENV)-python3.x/)"
	@echo "make clean   remove $(VENV)/, $(DEMO_OUT)/ and caches"
	@echo
	@echo "Each sets up what it needs in $(VENV)/. Another Python: make demo PYTHON=python3.12"

# Asked every time: scripts/setup_venv.py returns at once when its stamp says that nothing has changed.
venv:
	@$(PYTHON) scripts/setup_venv.py $(VENV)

# What the demo needs is less than half of that; `make test` adds the rest.
demo-venv:
	@$(PYTHON) scripts/setup_venv.py $(VENV) demo

demo: demo-venv
	@$(RUN) scripts/demo/demo.py --out $(DEMO_OUT) $(DEMO_ARGS)

demo-from-scratch: demo-venv
	@$(RUN) scripts/demo/demo.py --out $(DEMO_OUT) --from-scratch $(DEMO_ARGS)

test: lint types
	$(RUN) -m pytest $(TEST_ARGS)

quick: venv
	$(RUN) -m pytest $(QUICK) $(TEST_ARGS)

lowest:
	@$(PYTHON) scripts/setup_venv.py $(VENV)-lowest lowest
	$(VENV)-lowest/bin/python -m pytest $(QUICK) $(TEST_ARGS)

versions:
	@PATH="$(PYENV):$$PATH"; for python in $(PYTHONS); do \
	    $$python -c "" 2>/dev/null || { echo "$$python is not installed: left out"; continue; }; \
	    $(MAKE) --no-print-directory quick PYTHON=$$python VENV=$(VENV)-$$python || exit 1; \
	done

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: venv
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(VENV)-* $(DEMO_OUT) build tmexport.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
