# make demo    sets everything up and runs federated Ferret on a small model, under 2 minutes
# make test    sets everything up and runs the tests
#
# PYTHON, VENV and TORCH may be set: make test PYTHON=python3.12 TORCH=torch==2.14.1
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
PYTEST_ARGS ?=
comma := ,

pip_install := pip install $(if $(CI),-q)
comma := ,
bin := $(abspath $(VENV))/bin
cuda_bin := $(abspath $(CUDA_VENV))/bin
native := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*/*)
cpp := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu tests/cpp/*.h tests/cpp/*.cpp benchmarks/micro/*.cu)
python := ferret_ext ferret_link tests benchmarks python_examples csrc docs setup.py

.PHONY: help demo test test-all cpp-test arm-test flower-test fuzz lint format cuda-build docs package clean
help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/package
	$(bin)/ferret simulate --preset demo --out runs/demo --overwrite

test: $(VENV)/package
	$(bin)/pytest -m "not slow" $(PYTEST_ARGS)

# make test-all   the slow tests too
test-all: $(VENV)/package
	$(bin)/pytest $(PYTEST_ARGS)

# make cpp-test   the C++ tests: as released, with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer
define ctest
$(bin)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(bin)/ninja -DPython_EXECUTABLE=$(bin)/python \
	-DFERRET_BINDINGS=OFF -DFERRET_CUDA=OFF -DFERRET_TESTS=ON -DFERRET_WERROR=ON $(2)
$(bin)/cmake --build $(1)
$(bin)/ctest --test-dir $(1) --output-on-failure --parallel 2
endef
cpp-test: $(VENV)/tools
	$(call ctest,build/cpp-release,)
	$(call ctest,build/cpp-sanitized,-DFERRET_SANITIZE=address$(comma)undefined)
	$(call ctest,build/cpp-threads,-DFERRET_SANITIZE=thread)

# make arm-test   the C++ tests compiled for 64-bit ARM and run under an emulator
arm-test: $(VENV)/tools
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null \
		|| { echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(call ctest,build/cpp-aarch64,--toolchain cmake/aarch64.cmake)

# make fuzz       hostile messages and ledgers for FUZZ_SECONDS (60), guided by coverage where atheris is installed
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/package
	@mkdir -p build/findings
	$(bin)/python tests/fuzz/fuzz.py all --seconds $(FUZZ_SECONDS) --findings build/findings

# make flower-test FLWR=1.29.0   the tests that start federations, with that version of Flower
FLWR ?= 1.29.0
flwr_env := build/flwr-$(FLWR)
flower-test: $(VENV)/package
	$(bin)/python -m venv --without-pip $(flwr_env)
	$(bin)/pip --python $(flwr_env)/bin/python install -q flwr==$(FLWR)
	echo "import site; site.addsitedir('$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(flwr_env)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_rest.pth
	$(flwr_env)/bin/python -m pytest -m flower $(PYTEST_ARGS) tests/remote

# make lint       formatting, common mistakes and types
lint: $(VENV)/dev
	$(bin)/ruff check $(python)
	$(bin)/ruff format --check $(python)
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp)

# make format     what lint can repair
format: $(VENV)/dev
	$(bin)/ruff check --fix $(python)
	$(bin)/ruff format $(python)
	$(bin)/clang-format -i $(cpp)

# make cuda-build compiles and imports the CUDA library against a CUDA torch, and reads what its kernels cost off
#                 their machine code; needs nvcc and no GPU
cuda-build: $(CUDA_VENV)/torch
	FERRET_CUDA=ON CMAKE_ARGS="-DFERRET_WERROR=ON -DFERRET_TESTS=ON" $(cuda_bin)/$(pip_install) ".[test]"
	$(cuda_bin)/pytest tests/test_packaging.py
	$$(command -v nvcc || echo /usr/local/cuda/bin/nvcc) -std=c++17 -Xcompiler=-Wall,-Wextra,-Werror -I csrc benchmarks/micro/rates.cu -o build/rates \
		$(foreach arch,80 90a 120,-gencode=arch=compute_$(arch)$(comma)code=sm_$(arch))
	cp build/*-$(subst ==,-,$(CUDA_TORCH))*/kernel_resources.txt build/kernel_resources.txt
	cat build/kernel_resources.txt
	$(cuda_bin)/python benchmarks/sass_report.py --json build/sass.json \
		build/*-$(subst ==,-,$(CUDA_TORCH))*/CMakeFiles/ferret_cuda.dir/csrc/cuda/*.o

# make docs       the documentation as a site, build/site; every link in it is checked
docs: $(VENV)/package
	$(bin)/$(pip_install) --no-build-isolation -e ".[docs]"
	$(bin)/mkdocs build --strict

# make package    sdist and wheel in dist/; the wheel, built from the sdist, is installed into an environment of its own
package: $(VENV)/package
	rm -rf dist build/package
	$(bin)/$(pip_install) build
	FERRET_CUDA=OFF CMAKE_ARGS=-DFERRET_WERROR=ON $(bin)/python -m build --no-isolation
	$(bin)/pytest tests/test_dist.py
	$(PYTHON) -m venv build/package
	build/package/bin/$(pip_install) --no-compile $(TORCH) dist/*.whl
	cd build/package && bin/ferret doctor && bin/python -c "import ferret_ext; print(ferret_ext.__file__, ferret_ext.__version__)"

# make clean      removes what make made, but runs/
clean:
	rm -rf build dist *.egg-info $(VENV) $(CUDA_VENV) ferret_ext/lib ferret_ext/_native.*.so

# What the targets stand on: an environment with build tools, the package in it, and what lint needs.
$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(bin)/$(pip_install) "setuptools>=77" "cmake>=3.22" ninja "pybind11>=2.13"
	@touch $@

$(VENV)/package: $(VENV)/tools $(native)
	$(bin)/$(pip_install) $(TORCH)
	CMAKE_ARGS=-DFERRET_WERROR=$(if $(CI),ON,OFF) $(bin)/$(pip_install) --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/dev: $(VENV)/package
	$(bin)/$(pip_install) --no-build-isolation -e ".[dev]"
	@touch $@

$(CUDA_VENV)/torch:
	@test -x "$$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)" || { echo "nvcc is missing: install the CUDA toolkit"; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	$(cuda_bin)/$(pip_install) $(CUDA_TORCH)
	@touch $@
