"""Pushing, against a local server that speaks the Hub's routes; see `hub_cases.py` for what each case asks."""

import json
import subprocess
import sys

import hub_cases
import pytest
from commands import ROOT, environment


@pytest.fixture(scope="module")
def outcomes():
    """Traceback or `None` of each case, all run in one process."""
    command = [sys.executable, str(ROOT / "tests" / "hub_cases.py")]
    variables = environment(PYTHONPATH=f"{ROOT / 'src'}:{ROOT / 'tests'}")
    variables.pop("HF_HUB_OFFLINE")
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line["failed"] for line in lines}


@pytest.mark.parametrize("name", hub_cases.names_of_cases(), ids=lambda name: name.removeprefix("case_"))
def test_hub(name, outcomes):
    assert outcomes[name] is None, outcomes[name]
