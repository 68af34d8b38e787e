# make setup: PyTorch and the rest into .venv.  make quick: train on a small data set.  make train: run main_cnn.py.
# make test: run the tests.  Each sets up what it needs; a second call sets up nothing anew.
# On Linux they take PyTorch's CPU build where its index answers; with GPU=1, the default build (after `make clean`, where
# the CPU build is already installed), and they train on the GPU.

PYTHON ?= python3
BIN := .venv/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu
FASHION_MNIST := data/FashionMNIST/raw/train-images-idx3-ubyte

.PHONY: setup quick train tutorial test test-slow test-all mutants lint data clean

setup: .venv/installed

quick: .venv/installed
	$(BIN)/python main_cnn.py --dataset Digits --mirror False $(if $(GPU),--device auto)

train: .venv/installed data
	$(BIN)/python main_cnn.py $(if $(GPU),--device auto)

tutorial: .venv/installed
	$(BIN)/python main_tutorial.py $(if $(GPU),--device auto)

test: .venv/installed-dev data
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/installed-dev data
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-all: test test-slow

mutants: .venv/installed-dev data
	nice -n 10 $(BIN)/python tests/mutants.py $(ROOMS)

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, but $(PYTHON) is ' \
		+ sys.version.split()[0] + '. Name a newer one: make PYTHON=python3.12')"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }
	@if [ -z "$(GPU)" ] && [ "$$(uname)" = Linux ]; then \
		timeout 10 $(BIN)/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/')" 2>/dev/null \
		&& $(BIN)/python -m pip install --index-url $(CPU_INDEX) $$(grep -E '^torch(vision)?>' requirements.txt) \
		|| echo "$(CPU_INDEX) does not answer or does not fit: taking PyTorch's default build, 3 GB."; \
	fi
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

# Debian's package spares the download where we may install it; without it, the script downloads the data set itself.
data:
	@if [ ! -e $(FASHION_MNIST) ] && [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] \
		&& command -v apt-get >/dev/null; then \
		apt-get update && apt-get install -y dataset-fashion-mnist || echo "No Debian package: downloading instead."; \
	fi

clean:
	rm -rf .venv .mutants .pytest_cache .ruff_cache
