PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
BIN := .venv/bin
export OMP_WAIT_POLICY := PASSIVE

INSTALLED := .venv/installed-$(REQUIREMENTS)

.PHONY: install test demo benchmark-libreoffice base clean

install: $(INSTALLED)

# A new environment for other requirements: FAISS's CPU and GPU builds must not lie in one.
$(INSTALLED): $(REQUIREMENTS) requirements-common.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -q -r $(REQUIREMENTS)
	# COMET's pins exclude the libraries above; without them it runs (see docs/architecture.md)
	$(BIN)/pip install -q --no-deps unbabel-comet==2.2.7 entmax==1.3
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

demo: install
	$(BIN)/python prepare_data.py --config configs/data/pretix.yaml
	$(BIN)/python build_index.py --config configs/demo/build.yaml
	$(BIN)/python build_index.py --config configs/demo/build_dispersed.yaml
	$(BIN)/python evaluate.py --config configs/demo/evaluate.yaml

# LibreOffice's help pages; needs apt-get
benchmark-libreoffice: install
	$(BIN)/python prepare_data.py --config configs/data/libreoffice_help.yaml
	$(BIN)/python build_index.py --config configs/libreoffice_help/build.yaml
	$(BIN)/python evaluate.py --config configs/libreoffice_help/evaluate.yaml

# The demo's base model from scratch: hours on two cores; needs apt-get
base: install
	$(BIN)/python prepare_data.py --config configs/data/pretix.yaml
	$(BIN)/python prepare_data.py --config configs/data/libreoffice_help.yaml
	$(BIN)/python prepare_data.py --config configs/data/program_catalogs.yaml
	$(BIN)/python init_model.py --config configs/base_init.yaml
	$(BIN)/python train.py fit --config configs/base.yaml

clean:
	rm -rf .venv runs data
