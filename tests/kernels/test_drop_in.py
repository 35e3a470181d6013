"""The kernels work as a copied folder, without plum on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "sid"

SCRIPT = """
import sys
sys.modules["plum"] = None  # importing plum is now an error
import torch
from code_usage import code_usage
device = "cuda" if torch.cuda.is_available() else "cpu"
codes = torch.tensor([[0, 1], [2, 1], [0, 9]], dtype=torch.int32, device=device)
assert code_usage(codes, [3, 2]).tolist() == [2, 0, 1, 0, 2, 1]
from residual_quantize import pack_codebooks, residual_quantize
codebooks = torch.tensor([[0.0, 0.0], [4.0, 4.0], [0.0, 1.0], [1.0, 0.0]], device=device)
x = torch.tensor([[4.0, 5.2], [1.0, 0.4]], device=device)
assert residual_quantize(x, pack_codebooks(codebooks, [2, 2])).codes.tolist() == [[1, 0], [0, 1]]
"""


def test_copied_folder_runs_alone(tmp_path):
    for file in KERNELS.glob("[!_]*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=os.environ, check=True)


def test_no_package_at_the_level_that_would_shadow_another():
    assert not (KERNELS.parent / "__init__.py").exists()
