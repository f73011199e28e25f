# The two commands of a newcomer are `make demo` and `make test`; each sets up .venv first.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint clean

# Any change of the requirements installs again; the stamp is written last, so a broken install is tried anew.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vop needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/vop demo output=demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/pre-commit run --all-files

clean:
	rm -rf $(VENV) demo run build dist *.egg-info
