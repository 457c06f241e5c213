#!/usr/bin/env bash
# Runs the site's tests in an environment without torch, numpy and the kernels: only what FakeEngine needs is installed.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q anyio msgspec jinja2 platformdirs fastapi httpx pytest
"$folder/venv/bin/python" -c 'import importlib.util as u; assert not [m for m in ("torch", "numpy", "outlines") if u.find_spec(m)]'
cd "$here"
PYTHONPATH="$here/../../src" "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . test_app.py
