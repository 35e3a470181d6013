"""Every shipped Triton kernel compiles for the GPUs we support, on a machine without one."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import plum.kernels

# Shared memory that a program may have, in bytes, by architecture.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Name of the kernel, signature, compile-time constants, compiler options.
Variant = tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]


def code_usage(architecture: int) -> list[Variant]:
    types = {
        "p_counts": "*i64",
        "num_rows": "i64",
        **dict.fromkeys(("num_levels", "level", "offset", "size", "bad_slot"), "i32"),
    }
    return [
        ("_code_usage_kernel", {"p_codes": codes, **types}, {"BLOCK": block, "BINS": bins}, {})
        for codes in ("*i32", "*i64")
        for block, bins in ((1024, 0), (1024, 512), (4096, 4096))
    ]


def residual_quantize(architecture: int) -> list[Variant]:
    kernel = importlib.import_module("plum.kernels.residual_quantize")
    types = {
        **dict.fromkeys(("p_books", "p_bias", "p_centers", "p_bounds", "p_norms"), "*fp32"),
        **dict.fromkeys(("p_residual", "p_rows"), "*fp32"),
        **dict.fromkeys(("p_operand", "p_t"), "*bf16"),
        **dict.fromkeys(("p_codes", "p_layout"), "*i32"),
        **dict.fromkeys(("p_usage", "p_bad_row", "p_scratch"), "*i64"),
        **dict.fromkeys(("num_rows", "width", "num_levels", "window"), "i32"),
    }
    found: list[Variant] = []
    for width, rows in ((32, "*fp32"), (384, "*fp32"), (384, "*bf16"), (1024, "*fp16")):
        constants = kernel.default_config(width, SHARED[architecture])
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
        constants |= {"RESIDUAL": rows == "*fp32", "USAGE": rows == "*fp32"}
        found.append(("_residual_quantize_kernel", {"p_x": rows, **types}, constants, options))
    # A launch makes a constant of a width of 1.
    constants = kernel.default_config(1, SHARED[architecture])
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants |= {"RESIDUAL": True, "USAGE": True, "width": 1}
    del types["width"]
    found.append(("_residual_quantize_kernel", {"p_x": "*fp32", **types}, constants, options))
    return found


VARIANTS = {"code_usage": code_usage, "residual_quantize": residual_quantize}

SCRIPT = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
module, architecture = importlib.import_module(sys.argv[1]), int(sys.argv[2])
for name, types, constants, options in json.load(sys.stdin):
    kernel = getattr(module, name)
    source = ASTSource(
        kernel,
        signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
        constexprs=constants,
        # As at a launch: torch aligns what it allocates, and widths are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if n.startswith("p_") or (n == "width" and n in types)
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:([0-9]+) STACK:([0-9]+)", usage.stdout + usage.stderr)
    print(json.dumps({
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "fused_fp64": "fma.rn.f64" in compiled.asm["ptx"],
        "flushed": ".ftz.f32" in compiled.asm["ptx"].replace("sqrt.approx.ftz.f32", ""),
    }))
"""


def test_every_kernel_has_variants():
    assert {module.name for module in pkgutil.iter_modules(plum.kernels.__path__)} == set(VARIANTS)


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("module", VARIANTS)
def test_compiles_ahead_of_time(module, architecture, record_property):
    variants = VARIANTS[module](architecture)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"plum.kernels.{module}", str(architecture)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        input=json.dumps(variants),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for (name, types, constants, _), report in zip(variants, reports, strict=True):
        shown = " ".join(f"{constant}={value}" for constant, value in constants.items())
        record_property(
            "kernel",
            f"{name} sm_{architecture} {next(iter(types.values()))} {shown}: "
            f"{report['registers']} registers, {report['stack']} B stack, "
            f"{report['shared']} B shared memory",
        )
        assert report["shared"] <= SHARED[architecture]
        # The contract adds rounded fp64 squares, and residuals may be denormal.
        assert not report["fused_fp64"] and not report["flushed"]
