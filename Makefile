# make setup: install PyTorch and the other packages into .venv.  make quick: train on a small data set.
# make train: run main_cnn.py.  make test: run the tests.  Each installs what it needs, once.
# On Linux they install PyTorch's CPU build if its index is reachable. With GPU=1 they install the default build and train
# on the GPU (run `make clean` first if the CPU build is installed).

PYTHON ?= python3
BIN := .venv/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu
FASHION_MNIST := data/FashionMNIST/raw/train-images-idx3-ubyte

.PHONY: setup quick train tutorial test test-slow test-all lint data clean

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

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, but $(PYTHON) is ' \
		+ sys.version.split()[0] + '. Use a newer one: make PYTHON=python3.12')"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }
	@if [ -z "$(GPU)" ] && [ "$$(uname)" = Linux ]; then \
		timeout 10 $(BIN)/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/')" 2>/dev/null \
		&& $(BIN)/python -m pip install --index-url $(CPU_INDEX) $$(grep -E '^torch(vision)?>' requirements.txt) \
		|| echo "$(CPU_INDEX) is not reachable or has no matching build: installing PyTorch's default build, 3 GB."; \
	fi
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

# Debian's package replaces the download if it can be installed; otherwise the script downloads the data set itself.
data:
	@if [ ! -e $(FASHION_MNIST) ] && [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] \
		&& command -v apt-get >/dev/null; then \
		apt-get update && apt-get install -y dataset-fashion-mnist || echo "No Debian package: downloading instead."; \
	fi

clean:
	rm -rf .venv .pytest_cache .ruff_cache
