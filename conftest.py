"""The tests check trmrl.py, or the file that the variable TRMRL names, which exercises/check.py sets."""

import importlib.util
import os
import sys
from pathlib import Path

SCRIPT = os.environ.get("TRMRL", Path(__file__).with_name("trmrl.py"))
spec = importlib.util.spec_from_file_location("trmrl", SCRIPT)
sys.modules["trmrl"] = importlib.util.module_from_spec(spec)  # what every test, and baselines/, then import
spec.loader.exec_module(sys.modules["trmrl"])


def pytest_report_header():
    return f"checked: {SCRIPT}"
