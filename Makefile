PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
BIN := .venv/bin
export OMP_WAIT_POLICY := PASSIVE

MODEL ?= data/models/firefox-en-pt
IMPORTED := $(if $(filter data/models/firefox-en-pt,$(MODEL)),data/models/firefox-en-pt/config.json)

STATES := runs/demo/states
DISPERSED := runs/demo/dispersed

INSTALLED := .venv/installed-$(REQUIREMENTS)

.PHONY: install test demo benchmark-libreoffice clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Any other English-Portuguese model: make demo MODEL=hub-name-or-folder
demo: install $(IMPORTED)
	$(BIN)/python prepare_data.py --config configs/data/pretix.yaml
	$(BIN)/python build_index.py build --config configs/demo/build.yaml --backbone.model $(MODEL)
	$(BIN)/python build_index.py states --config configs/demo/build.yaml --backbone.model $(MODEL) \
	  --datastore.folder $(STATES)/train
	$(BIN)/python build_index.py states --config configs/demo/build.yaml --backbone.model $(MODEL) \
	  --datastore.folder $(STATES)/validation --datastore.corpus.path data/pretix/validation.jsonl
	test -e $(DISPERSED)/trained || $(BIN)/python train.py fit --config configs/demo/dispersion.yaml \
	  --model.backbone.model $(MODEL) --overwrite true
	touch $(DISPERSED)/trained
	$(BIN)/python build_index.py rekey --backbone.model $(DISPERSED)/model --datastore.states $(STATES)/train \
	  --datastore.folder $(DISPERSED)/store
	$(BIN)/python evaluate.py --config configs/demo/evaluate.yaml --backbone.model $(MODEL) --overwrite true

# LibreOffice's help pages; needs apt-get
benchmark-libreoffice: install $(IMPORTED)
	$(BIN)/python prepare_data.py --config configs/data/libreoffice_help.yaml
	$(BIN)/python build_index.py build --config configs/libreoffice_help/build.yaml --backbone.model $(MODEL)
	$(BIN)/python evaluate.py --config configs/libreoffice_help/evaluate.yaml --backbone.model $(MODEL) --overwrite true

# The model that Firefox translates with in the browser
data/models/firefox-en-pt/config.json: install
	$(BIN)/python import_model.py --config configs/models/firefox_en_pt.yaml

clean:
	rm -rf .venv runs data
