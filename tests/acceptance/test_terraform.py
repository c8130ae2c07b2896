"""The Terraform of each example is formatted; what stands in it is tested beside its example."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from installation import ROOT

EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/terraform"))


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_terraform_is_formatted(example: Path) -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-diff", "-recursive", str(example)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
