# make chat      set everything up and chat            ARGS="--kv-budget 512" passes options on
# make test      set everything up and run the tests   ARGS="-k ledger" passes options on
# make lint      set everything up and look for faults without running the code: ruff, and mypy on the type hints
# make setup     the set-up alone: afterwards .venv/bin/kvlocal works
# make sanitize  the native tests under the address and undefined behaviour sanitizers
# make leaks     a short run of the library under LeakSanitizer, which shares that build
# make test-vulkan   the tests of a GPU, on Mesa's Vulkan driver that needs none; left out where that cannot be had
# make stock     llama.cpp without our patches, in build/stock/dist/lib, to compare with
# make stock-server  llama.cpp's own server without our patches, in build/stock-server/bin, to compare with
# make pack      everything that a machine without a network needs, in build/kvlocal-offline.tar.gz (ARGS="--help" tells the options)
# make wheel     a wheel for any processor of this kind, in dist: who installs it needs no compiler
# make test-wheel    installs it into an empty environment and chats (ARGS="--python python3.13" chooses the interpreter)
# make cuda-toolkit  what compiles for NVIDIA devices, into .venv, where the system has no CUDA toolkit
# make gpu-report    builds with CUDA and measures on the device, in build/gpu-report (ARGS="--help" tells the options)
# make clean     remove .venv and build
#
# CMAKE_ARGS="-DGGML_CUDA=ON" chooses a backend, PYTHON=python3.12 an interpreter.

MAKEFLAGS += --no-print-directory
# What make pack brings along takes the place of the network.
ifneq ($(wildcard offline/sdist),)
override CMAKE_ARGS += -DKVLOCAL_LLAMA_CPP_DIR=$(CURDIR)/offline/sdist/vendor/llama.cpp
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = $(CURDIR)/offline/wheels
endif
export CMAKE_ARGS
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
ifeq ($(PYTHON),)
$(error kvlocal needs Python 3.11 or later; install one, or say which: make PYTHON=...)
endif

# Standard input and output belong to the chat and to the tests alone.
bootstrap = $(PYTHON) native/bootstrap.py </dev/null >&2

.PHONY: chat test lint setup sanitize leaks test-vulkan stock stock-server pack wheel test-wheel cuda-toolkit gpu-report clean

chat:
	@$(bootstrap) && exec .venv/bin/kvlocal chat $(ARGS)

# Most of a test is computed by one thread, so files of tests run beside each other.
test:
	@$(bootstrap) --test && exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# mypy is to find the directory cli by the name that it has as a package.
lint:
	@$(bootstrap) --lint && mkdir -p build/lint && ln -sfn ../../cli build/lint/kvlocal_cli
	@.venv/bin/ruff check
	@.venv/bin/mypy

setup:
	@$(bootstrap)

# A second build of the library, outside the package: $(call library,NAME,OPTIONS) leaves it in build/NAME/dist
library = PATH="$(CURDIR)/.venv/bin:$$PATH" && ( \
	cmake -S . -B build/$(1) -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python $(2) $(CMAKE_ARGS) && \
	cmake --build build/$(1) --target llama kvlocal-chat && \
	cmake --install build/$(1) --component kvlocal --prefix build/$(1)/dist ) </dev/null >&2

# The library with the sanitizers in it, and what Python needs to load it.
sanitized = $(bootstrap) --test && $(call library,sanitize,-DKVLOCAL_SANITIZE=ON -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	-DCMAKE_C_FLAGS_RELWITHDEBINFO='-O1 -g1' -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1')
under_sanitizers = KVLOCAL_LIB_DIR=$(CURDIR)/build/sanitize/dist/lib \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

# Its ggml asserts that numbers are numbers, and one test is about some that are not.
sanitize:
	@$(sanitized)
	@$(under_sanitizers) .venv/bin/python -m pytest tests/test_native.py tests/test_rows.py tests/test_row_types.py tests/test_attention.py \
		tests/test_products.py tests/test_compiled_template.py tests/test_answer_formats.py tests/test_template_tree.py -k "not masked_cells_never" $(ARGS)

leaks:
	@$(sanitized)
	@$(under_sanitizers) .venv/bin/python tests/measure/leaks.py

# A second build, with ggml's Vulkan backend. What is marked as a test of devices can be run on it too: ARGS="-m device"
test-vulkan:
	@$(bootstrap) --test && .venv/bin/python native/vulkan_tools.py </dev/null >&2
	@[ ! -e .venv/vulkan/environment ] || { . .venv/vulkan/environment && \
		$(call library,vulkan,-DGGML_VULKAN=ON -DCMAKE_BUILD_TYPE=Release) && \
		KVLOCAL_LIB_DIR=$(CURDIR)/build/vulkan/dist/lib .venv/bin/python -m pytest --device gpu $(or $(ARGS),tests/test_offload.py); }

stock:
	@$(bootstrap) && $(call library,stock,-DKVLOCAL_STOCK=ON -DCMAKE_BUILD_TYPE=Release)

stock-server:
	@$(bootstrap) && .venv/bin/python native/stock_server.py

pack:
	@$(bootstrap) && .venv/bin/python native/pack.py $(ARGS)

wheel:
	@$(bootstrap) --environment && .venv/bin/python native/wheel.py $(ARGS)

test-wheel:
	@$(PYTHON) tests/measure/try_wheel.py $(ARGS)

cuda-toolkit:
	@$(bootstrap) --environment && .venv/bin/python native/cuda_toolkit.py $(ARGS)

# The backend is the same with and without the patches, and takes long to compile: stock llama.cpp gets ours.
gpu-report:
	@CMAKE_ARGS="$(CMAKE_ARGS) -DGGML_CUDA=ON" $(bootstrap) --test
	@$(call library,stock,-DKVLOCAL_STOCK=ON -DCMAKE_BUILD_TYPE=Release)
	@cp .venv/lib/python*/site-packages/kvlocal/lib/libggml.so .venv/lib/python*/site-packages/kvlocal/lib/libggml-base.so \
		.venv/lib/python*/site-packages/kvlocal/lib/libggml-cuda.so build/stock/dist/lib/
	@.venv/bin/python tests/measure/gpu_report.py $(ARGS)

clean:
	@rm -rf .venv build
