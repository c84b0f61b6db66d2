# The two commands that do everything, set-up included: make demo, make test. They need Python 3.11+ and make.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo_out
DEMO_ARGS ?=
TEST_ARGS ?=
RUN = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-from-scratch test lint clean venv

help:
	@echo "make demo    make a small pretrained Mamba-2 ternary, export it to GGUF, prove it and run it (into $(DEMO_OUT)/)"
	@echo "make demo-from-scratch   the same, and train that Mamba-2 first"
	@echo "make test    ruff, then every test"
	@echo "make lint    ruff alone: rules and formatting"
	@echo "make clean   remove $(VENV)/, $(DEMO_OUT)/ and caches"
	@echo
	@echo "Each sets up what it needs in $(VENV)/. Another Python: make demo PYTHON=python3.12"

# Asked every time: scripts/setup_venv.py returns at once when its stamp says that nothing has changed.
venv:
	@$(PYTHON) scripts/setup_venv.py $(VENV)

demo: venv
	@$(RUN) scripts/demo/demo.py --out $(DEMO_OUT) $(DEMO_ARGS)

demo-from-scratch: venv
	@$(RUN) scripts/demo/demo.py --out $(DEMO_OUT) --from-scratch $(DEMO_ARGS)

test: lint
	$(RUN) -m pytest $(TEST_ARGS)

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO_OUT) build tmexport.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
