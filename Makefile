# Each target sets itself up in .venv on a machine that has Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test bench docs clean
setup: .venv/.installed

.venv/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("massl-fast needs Python 3.10 or newer; this is %s. Name another one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@echo "Installing into .venv: PyTorch with CUDA and what else the project takes, some 5 GB. This takes minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test,eval,report,tensorboard,dali-cuda13,docs]'
	@touch $@

demo: setup
	@echo "Step 1 of 3: train a small network without labels, on 6000 generated images of 12 forms (minutes on 2 cores)."
	@echo "k-NN accuracy is the figure to watch: the share of held-out images whose nearest training images have the right form."
	$(BIN)/massl-fast train --recipe demo
	@echo "Step 2 of 3: evaluate the teacher by k-NN and a linear probe, against the untrained network and raw pixels."
	$(BIN)/massl-fast eval all --checkpoint runs/demo --which teacher --plan demo --out runs/demo/evaluation
	@echo "Step 3 of 3: write the report."
	$(BIN)/massl-fast report runs/demo
	@echo "Done. Open runs/demo/report.html in a browser. Then: $(BIN)/massl-fast train --data.train FOLDER_OF_IMAGES; docs/get_started.md."

test: setup
	$(BIN)/python -m pytest

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html in a browser; for the search: $(BIN)/python -m http.server --directory build/site"

bench: setup
	$(BIN)/massl-fast bench kernels

clean:
	rm -rf .venv build *.egg-info
