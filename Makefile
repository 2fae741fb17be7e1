# `make` lists what there is. Everything runs in .venv, which is made at first use and then left in peace.
PY ?= python3
STUDY ?= cifar10-small
# Timings and small models gain nothing from more cores than this; CORES=64 says otherwise.
CORES ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# Tests of a file share what they draw and load, so that a core takes whole files.
SHARED = -n $(CORES) --dist loadfile
BIN := .venv/bin
NAME = $(basename $(notdir $(STUDY)))
DATA = $(or $(VITLAB_DATA),data)
AGAIN = $(DATA)/again

.PHONY: help demo smoke study found reproduce figures slides html readme test test-long test-oldest lab lint bench install

help:
	@echo "make demo                  train, prune and compare two tiny models, in minutes"
	@echo "make test                  the tests; make test-long those too that take minutes, then make test-oldest:"
	@echo "                           the tests with the oldest packages that pyproject.toml allows"
	@echo "make lab                   JupyterLab; its first page leads to the notebooks"
	@echo "make study STUDY=NAME      all notebooks of a study of notebooks/params: $(basename $(notdir $(wildcard notebooks/params/*.yaml)))"
	@echo "                           MODEL=vit one model of it, SEED=1 another seed, CORES=2, ARGS=-n to see what would run"
	@echo "make reproduce STUDY=NAME  its results again, beside the published ones; MODEL=vit of one model, SEEDS='0 1'"
	@echo "make figures STUDY=NAME    its figures, tables and slides again, from the results there are;"
	@echo "                           ARGS='-p titled=true' with a title and their source in the pictures"
	@echo "make slides STUDY=NAME     a talk of thirteen slides, from the tables and pictures in figures/: .pptx and one HTML file;"
	@echo "                           ARGS='--long --only 3,9 --template FILE.potx' with an appendix, some of them, your own look"
	@echo "make html STUDY=NAME       its executed notebooks as pages, one file each, beside them"
	@echo "make readme                the results and the picture in README.md, and docs/results.md again, from the tables in figures/"
	@echo "make smoke                 every notebook with next to no training, to see that all of it runs"
	@echo "make bench                 what things cost, and what a cut brings in time, beside the peers"
	@echo "make lint                  style of code and notebooks"

demo smoke: %: install
	@$(MAKE) --no-print-directory study STUDY=$@
	@echo "Models this small are no judges between criteria (notebook 3 says why), nor their times of what saves time:"
	@echo "docs/results.md has larger ones."

study: install
	@echo "Study $(NAME): running the notebooks that are missing or out of date, on $(CORES) cores."
	@$(BIN)/snakemake --cores $(CORES) --config study=$(STUDY) $(if $(MODEL),model=$(MODEL)) \
	    $(if $(SEED),seed=$(SEED)) $(if $(filter demo smoke,$(STUDY)),together=1) $(ARGS) || { echo "Study $(NAME) is not complete: the reason stands above."; exit 1; }
	@$(if $(filter -n,$(ARGS)),true,$(MAKE) --no-print-directory found STUDY=$(STUDY))

found:  # what a study leaves, and where
	@# runs of another clone may lie in the data root, and its figures not here
	@[ -d figures/$(NAME) ] || $(BIN)/python -m vitlab run 7_report --study $(STUDY)
	@$(BIN)/python -m vitlab results $(STUDY) --short 2>/dev/null || cat figures/$(NAME)/efficiency.md
	@echo
	@echo "Figures and tables: figures/$(NAME)/"
	@echo "Executed notebooks: $(DATA)/runs/$(NAME)/notebooks/ and $(DATA)/runs/$(NAME)/*/seed*/notebooks/"
	@echo "Checkpoints: the other folders of $(DATA)/runs/$(NAME)/*/seed*/"
	@one=$$(ls -d $(DATA)/runs/$(NAME)/*/seed*/*-reconstructed 2>/dev/null | grep -m 1 . || echo FOLDER); \
	    echo "Export one: $(BIN)/python -m vitlab export $$one $(DATA)/small.onnx"

reproduce: install
	@[ -f figures/$(NAME)/results.csv ] || { echo "figures/$(NAME) has no results to compare with."; exit 1; }
	@mkdir -p $(AGAIN)  # with the images of the data root, and runs of its own
	@for each in $$(ls $(DATA)); do case $$each in runs|again|bench) ;; *) ln -sfn "$$(realpath $(DATA)/$$each)" $(AGAIN);; \
	    esac; done
	@for seed in $(or $(SEEDS),0); do VITLAB_DATA=$(AGAIN) $(BIN)/snakemake results --cores $(CORES) \
	    --config study=$(STUDY) $(if $(MODEL),model=$(MODEL)) seed=$$seed $(ARGS) || exit 1; done
	@VITLAB_DATA=$(AGAIN) $(BIN)/python -m vitlab results $(STUDY) --compare

figures: install
	@$(BIN)/python -m vitlab run 7_report --study $(STUDY) $(ARGS)
	@$(BIN)/python slides $(STUDY)
	@echo "Figures and tables: figures/$(NAME)/"

slides: install
	@$(BIN)/python slides $(STUDY) $(ARGS)

html: install
	@[ -d "$(DATA)/runs/$(NAME)/notebooks" ] || { echo "No executed notebooks: make study STUDY=$(STUDY)"; exit 1; }
	@$(BIN)/python -m nbconvert --to html --no-prompt --template-file notebooks/page.html.j2 \
	    --CoalesceStreamsPreprocessor.enabled=True --log-level ERROR \
	    $$(find "$(DATA)/runs/$(NAME)" -name "[0-9]_*.ipynb" ! -name "*.*.ipynb")
	@echo "Pages: $(DATA)/runs/$(NAME)/notebooks/*.html and $(DATA)/runs/$(NAME)/*/seed*/notebooks/*.html"

readme: install
	@$(BIN)/python slides/pages.py README.md docs/results.md

test: install
	@echo "Running the tests (make test-long: those too that take minutes)."
	@$(BIN)/python -m pytest -m "not long" $(SHARED) $(ARGS)

test-long: install
	@$(BIN)/python -m pytest $(SHARED) $(ARGS)
	@$(MAKE) --no-print-directory test-oldest

test-oldest:
	@echo "Installing the oldest packages that pyproject.toml allows into .venv/oldest (6 GB), and testing with them."
	@$(PY) -m venv .venv/oldest
	@$(PY) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    extras = project["optional-dependencies"]; names = ["lab", "flow", "dev", "export", "bench", "log", "slides"]; \
	    lines = project["dependencies"] + [line for name in names for line in extras[name]]; \
	    print("\n".join(lines).replace(">=", "=="))' >.venv/oldest/oldest.txt
	@.venv/oldest/bin/pip install -q --disable-pip-version-check -r .venv/oldest/oldest.txt
	@# they warn about the newer packages that they bring with them
	@.venv/oldest/bin/python -m pytest -m "not long" -o filterwarnings=default $(SHARED) $(ARGS)

lab: install
	@# notebooks/jupyter: pages are shown as pages, and kernels import torch while the notebook opens. Jupyter wants
	@# root to be allowed by name.
	@JUPYTER_PATH="$(CURDIR)/notebooks/jupyter" JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/jupyter" \
	    $(BIN)/python -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/README.md \
	    $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

bench: install
	@$(BIN)/python benchmarks $(ARGS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify notebooks/*.ipynb

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt install.sh
	@PY=$(PY) ./install.sh
