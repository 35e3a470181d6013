"""Every shipped Triton kernel compiles for the GPUs we support, on a machine without one."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys

import pytest

import plum.kernels

SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

report = []
for kernel, signature, constants in importlib.import_module(sys.argv[1]).VARIANTS:
    source = ASTSource(
        kernel,
        signature={**signature, **{name: "constexpr" for name in constants}},
        constexprs=constants,
    )
    for architecture in (80, 90, 100):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        report.append(
            [kernel.__name__, architecture, compiled.metadata.shared, len(compiled.asm["cubin"])]
        )
print(json.dumps(report))
"""

KERNELS = [f"plum.kernels.{module.name}" for module in pkgutil.iter_modules(plum.kernels.__path__)]


@pytest.mark.parametrize("module", KERNELS)
def test_compiles_ahead_of_time(module):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, module], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert {row[1] for row in report} == {80, 90, 100}
    for name, architecture, shared, size in report:
        print(f"{module} {name} sm_{architecture}: {shared} B shared memory, cubin {size} B")
        assert size > 0 and shared <= 160 * 1024
