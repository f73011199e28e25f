# The two commands of a newcomer are `make demo` and `make test`; each sets up .venv first.
PYTHON ?= python3
VENV := .venv
LIGHTGLUE := .venv-lightglue

.PHONY: demo test test-lightglue test-nodes faults train lint lock clean

# Any change of the requirements installs again; the stamp is written last, so a broken install is tried anew.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vop needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,dev,localize]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/vop demo output=demo

# (pytest-xdist would start files with few tests last, which are the longest here; tests/conftest.py orders them.)
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Strikes real jobs with every fault and writes docs/reliability.md.
faults: $(VENV)/installed
	VOP_WRITE_RELIABILITY=1 $(VENV)/bin/python -m pytest tests/fault_matrix.py

# Trains xfeat's encoder on half of two walks through rooms and judges it on the rest: 8 minutes on two cores.
# DATA holds rgbd_kitchen/ and rgbd_office/, each with cameras.json, images and name.depth.png.
train: $(VENV)/installed
	@test -d "$(DATA)" || { echo 'make train DATA=FOLDER: it must hold rgbd_kitchen/ and rgbd_office/'; exit 2; }
	$(VENV)/bin/python benchmarks/training.py --data $(DATA) --work train --widths 128 --seeds 0

# ALIKED and DISK need torchvision, which brings the newest torch with CUDA (5 GB, runs on a CPU too): an environment of
# their own, on the pins of constraints.txt but for torch.
$(LIGHTGLUE)/installed: pyproject.toml constraints.txt constraints-lightglue.txt
	$(PYTHON) -m venv $(LIGHTGLUE)
	grep -v '^torch==' constraints.txt > $(LIGHTGLUE)/constraints.txt
	$(LIGHTGLUE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LIGHTGLUE)/constraints.txt \
	    --constraint constraints-lightglue.txt --editable '.[lightglue,cpu,dev]'
	touch $@

test-lightglue: $(LIGHTGLUE)/installed
	$(LIGHTGLUE)/bin/python -m pytest tests/test_lightglue.py

# Two machines of Linux namespaces that share only a bucket; says why where the kernel permits none.
test-nodes: $(VENV)/installed
	VOP_TEST_NODES=1 $(VENV)/bin/python -m pytest tests/test_two_nodes.py

lint: $(VENV)/installed
	$(VENV)/bin/pre-commit run --all-files

# What the images of cluster/ install, with hashes: for their platform, whatever this machine is. It needs uv, and for the
# CPU build of torch a place to find it: PyTorch's own index, which uv knows, or TORCH_CPU='--find-links FOLDER'.
# No index is written into the files.
UV ?= uv
TORCH_CPU ?= --torch-backend cpu
LOCK := $(UV) pip compile --quiet --python-version 3.11.14 --python-platform x86_64-manylinux_2_28 --only-binary :all: \
    --generate-hashes --no-annotate --no-header --no-emit-index-url --constraint constraints.txt

lock:
	$(LOCK) --extra gpu pyproject.toml cluster/requirements.in --output-file cluster/requirements-gpu.lock
	echo torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu | $(LOCK) --extra cpu $(TORCH_CPU) --override - \
	    pyproject.toml cluster/requirements.in --output-file cluster/requirements-cpu.lock

clean:
	rm -rf $(VENV) $(LIGHTGLUE) demo run train build dist *.egg-info
