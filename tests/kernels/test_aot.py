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


def codebook_sums(architecture: int) -> list[Variant]:
    types = {
        **dict.fromkeys(("p_order", "p_starts", "p_firsts", "p_owners"), "*i64"),
        **dict.fromkeys(("p_parts", "p_sums"), "*fp64"),
        **dict.fromkeys(("num_rows", "width", "num_codes"), "i32"),
        **{"p_codes": "*i32", "p_codewords": "*fp32"},
    }
    constants = {"PIECE": 256, "ROWS": 16, "COLUMNS": 128}
    narrow = {name: kind for name, kind in types.items() if name != "width"}
    return [
        *(
            ("_pieces_kernel", {"p_rows": rows, **types}, constants, {})
            for rows in ("*fp32", "*bf16", "*fp16")
        ),
        # A launch makes a constant of a width of 1.
        ("_pieces_kernel", {"p_rows": "*fp32", **narrow}, {**constants, "width": 1}, {}),
        ("_parts_kernel", types, {"COLUMNS": 128}, {}),
    ]


def residual_quantize(architecture: int) -> list[Variant]:
    kernel = importlib.import_module("plum.kernels.residual_quantize")
    types = {
        **dict.fromkeys(("p_books", "p_bias", "p_centers", "p_bounds", "p_norms"), "*fp32"),
        **dict.fromkeys(("p_residual", "p_rows"), "*fp32"),
        **dict.fromkeys(("p_operand", "p_t"), "*fp16"),
        **dict.fromkeys(("p_codes", "p_layout", "p_listed"), "*i32"),
        **dict.fromkeys(("p_usage", "p_bad_row", "p_scratch"), "*i64"),
        **dict.fromkeys(("num_rows", "width", "num_levels", "window"), "i32"),
    }
    found: list[Variant] = []
    for width, rows, listed in (
        (32, "*fp32", False),
        (384, "*fp32", False),
        (384, "*bf16", True),
        (1024, "*fp16", False),
    ):
        constants = kernel.default_config(width, SHARED[architecture])
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
        constants |= {"RESIDUAL": rows == "*fp32", "USAGE": rows == "*fp32", "LISTED": listed}
        found.append(("_residual_quantize_kernel", {"p_x": rows, **types}, constants, options))
    # A launch makes a constant of a width of 1.
    constants = kernel.default_config(1, SHARED[architecture])
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants |= {"RESIDUAL": True, "USAGE": True, "LISTED": True, "width": 1}
    del types["width"]
    found.append(("_residual_quantize_kernel", {"p_x": "*fp32", **types}, constants, options))
    return found


# The arrays of a trie, and the levels of states where each has its own.
TRIE = {
    **dict.fromkeys(("p_table", "p_begins", "p_masks"), "*i64"),
    **dict.fromkeys(("p_starts", "p_ranks"), "*u32"),
    "p_codes": "*u16",
}
LEVELS = {"p_levels": "*i64", "p_columns": "*i64"}
NO_LEVELS = dict.fromkeys(LEVELS)


def trie_advance(architecture: int) -> list[Variant]:
    types = {
        **dict.fromkeys(("p_states", "p_after"), "*i64"),
        **dict.fromkeys(("num_states", "num_levels", "level"), "i32"),
        **TRIE,
    }
    name, block = "_trie_advance_kernel", {"BLOCK": 128}
    return [
        (name, {"p_tokens": "*i64", **types}, {**block, "p_levels": None}, {}),
        (name, {"p_tokens": "*u8", **types, "p_levels": "*i64"}, block, {}),
    ]


def trie_walk(architecture: int) -> list[Variant]:
    types = {
        **dict.fromkeys(("p_roots", "p_states"), "*i64"),
        **dict.fromkeys(("stride_prefix", "stride_root", "num_prefixes", "length"), "i32"),
        **TRIE,
    }
    constants = {"stride_code": 1, "stride_end": 1, "BLOCK": 128}
    return [
        ("_trie_walk_kernel", {"p_prefixes": prefixes, **types}, constants, {})
        for prefixes in ("*i64", "*i16")
    ]


def trie_deny(architecture: int) -> list[Variant]:
    types = {
        **dict.fromkeys(("p_denied", "p_roots", "p_dead"), "*i64"),
        **dict.fromkeys(("num_roots", "num_levels", "num_denied"), "i32"),
        **{name: kind for name, kind in TRIE.items() if name != "p_masks"},
    }
    filter = {"p_filter_bits": "*i64", "p_filter_ranks": "*u32"}
    return [
        ("_trie_deny_kernel", types, {"BLOCK": 128, **dict.fromkeys(filter)}, {}),
        ("_trie_deny_kernel", {**types, **filter}, {"BLOCK": 128}, {}),
    ]


def forced_tail(architecture: int) -> list[Variant]:
    types = {
        **dict.fromkeys(("p_states", "p_tail"), "*i64"),
        "p_forced": "*i1",
        **dict.fromkeys(("num_states", "num_levels", "level"), "i32"),
        **TRIE,
    }
    return [("_forced_tail_kernel", types, {"BLOCK": 128}, {})]


def trie_mask(architecture: int) -> list[Variant]:
    numbers = ("stride_batch", "stride_beam", "num_beams", "width", "num_levels", "level", "column")
    types = {"p_states": "*i64", **dict.fromkeys(numbers, "i32"), **TRIE}
    constants = {"stride_column": 1, "BLOCK": 1024}
    return [
        ("_trie_mask_kernel", {"p_logits": "*fp32", **types}, {**constants, **NO_LEVELS}, {}),
        ("_trie_mask_kernel", {"p_logits": "*bf16", **types}, {**constants, **NO_LEVELS}, {}),
        ("_trie_mask_kernel", {"p_logits": "*fp16", **types, **LEVELS}, constants, {}),
    ]


# What the launches of a beam step hand over.
LISTS = {
    "p_items": "*i64",
    **dict.fromkeys(("p_keys", "p_counts", "p_cuts", "p_nears"), "*i32"),
}


def trie_beam_step(architecture: int) -> list[Variant]:
    kernel = importlib.import_module("plum.kernels.trie_beam_step")
    numbers = (
        *("stride_batch", "stride_beam", "num_beams", "width", "num_levels", "level", "column"),
        *("k", "room", "num_denied"),
    )
    types = {"p_scores": "*fp32", "p_states": "*i64", **LISTS, **TRIE}
    types |= dict.fromkeys(numbers, "i32")
    filter = {"p_filter_bits": "*i64", "p_filter_ranks": "*u32", "p_filter_masks": "*i64"}
    deny = {"p_dead": "*i64"}
    optional = {**LEVELS, **filter, **deny}
    found: list[Variant] = []
    for logits, beams, width, k, valid, given, mean_children in (
        ("*bf16", 64, 2048, 64, False, {}, None),
        ("*bf16", 64, 2048, 64, True, {}, None),
        ("*bf16", 128, 2048, 128, False, {}, 490.0),
        ("*bf16", 128, 2048, 128, True, {}, 490.0),
        ("*bf16", 128, 2048, 128, False, {}, 1.2),
        ("*fp32", 128, 32768, 128, False, {**filter, **deny}, None),
        ("*fp16", 128, 2048, kernel.MAX_K, True, optional, None),
    ):
        batch = 8 if beams == 64 else 32
        constants = kernel.beams_config(batch, beams, width, k, bool(given), mean_children)
        names = ("num_warps", "maxnreg")
        options = {name: constants.pop(name) for name in names if name in constants}
        constants |= {"VALID": valid, "stride_column": 1}
        constants |= {name: None for name in optional if name not in given}
        found.append(("_beams_kernel", {"p_logits": logits, **types, **given}, constants, options))
    return found


def trie_merge(architecture: int) -> list[Variant]:
    kernel = importlib.import_module("plum.kernels.trie_beam_step")
    types = {
        **dict.fromkeys(("p_wide", "p_states", "p_tokens", "p_parents", "p_after"), "*i64"),
        **dict.fromkeys(("num_beams", "num_levels", "level", "k", "room"), "i32"),
        **dict.fromkeys(("p_best", "p_slots"), "*i32"),
        "p_scores": "*fp32",
        **LISTS,
        **TRIE,
    }
    found: list[Variant] = []
    for beams, k, each in ((64, 64, None), (128, 128, None), (4096, kernel.MAX_K, "*i64")):
        constants = kernel.merge_config(beams, 2048, k)
        options = {"num_warps": constants.pop("num_warps")}
        levels = {"p_levels": each} if each else {}
        constants |= {} if each else {"p_levels": None}
        found.append(("merge_kernel", {**types, **levels}, constants, options))
    return found


VARIANTS = {
    "code_usage": code_usage,
    "codebook_sums": codebook_sums,
    "forced_tail": forced_tail,
    "residual_quantize": residual_quantize,
    "trie_advance": trie_advance,
    "trie_beam_step": trie_beam_step,
    "trie_mask": trie_mask,
    "trie_merge": trie_merge,
    "trie_walk": trie_walk,
    "trie_deny": trie_deny,
}
# Files without a kernel of their own.
SHARED_FILES = {"residual_choose", "trie_children", "trie_choose", "trie_search"}

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
    types = {n: types[n] for n in kernel.arg_names if n in types}
    source = ASTSource(
        kernel,
        signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
        constexprs=constants,
        # As at a launch: torch aligns what it allocates, and widths are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if n in types and n.startswith(("p_", "width", "stride_b"))
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
    files = {module.name for module in pkgutil.iter_modules(plum.kernels.__path__)}
    assert files - SHARED_FILES == set(VARIANTS)


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
        # The search adds rounded fp64 squares, and residuals may be denormal.
        if module in ("residual_quantize", "codebook_sums"):
            assert not report["fused_fp64"] and not report["flushed"]
