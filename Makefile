# Each target sets itself up in .venv on a machine that has Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test bench clean
setup: .venv/.installed

.venv/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("massl-fast needs Python 3.10 or newer; this is %s. Name another one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test,eval,report,tensorboard,dali-cuda13]'
	@touch $@

demo: setup
	$(BIN)/massl-fast train --recipe demo
	$(BIN)/massl-fast eval all --checkpoint runs/demo --which teacher --plan demo --out runs/demo/evaluation
	$(BIN)/massl-fast report runs/demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/massl-fast bench kernels

clean:
	rm -rf .venv build *.egg-info
