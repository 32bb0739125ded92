"""TRMRL=my_trmrl.py python -m pytest checks that file instead of trmrl.py (exercises/README.md)."""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    script = os.environ.get("TRMRL")
    if script and not Path(script).exists():
        pytest.exit(f"TRMRL: there is no file {script} here", returncode=2)


def pytest_report_header():
    return f"checked: {os.environ.get('TRMRL', 'trmrl.py')}"
