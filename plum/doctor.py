"""What ``plum doctor`` reports: versions, build, devices, and the backends of every op."""

from __future__ import annotations

import os
import platform
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch

import plum
import plum.ops
from plum import _native
from plum._library import GPU_KERNELS, OPS


def diagnose() -> dict[str, Any]:
    """Returns facts about this installation, one row per op and backend, and warnings.

    Returns:
        ``facts`` (name to value), ``ops`` (``op``, ``backend``, ``missing``: why it cannot run
        here or None, ``automatic_on``: devices whose automatic choice it is) and ``warnings``.

    Raises:
        InvalidConfig: PLUM_CPU_ISA asks for what there is not.
    """
    build = _native.build_info()
    package = Path(plum.__file__).resolve().parent
    facts = {
        "plum": f"{plum.__version__} from {package}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "native module": _native.missing() or f"built with {build['compiler']}",
        "CUDA kernels": f"nvcc {build['cuda']} for {build['cuda_architectures']}"
        if build.get("cuda")
        else "not built",
        "CPU instruction set": f"{build['isa']} of {', '.join(build['isas'])}" if build else "-",
        "triton": _native.missing_triton() or "runs here",
    }
    rows = []
    for op in sorted(OPS.values(), key=lambda op: op.name):
        chosen = {device: op.default_backend(device) for device in ("cpu", "cuda")}
        for name in ("reference", *op.backends):
            rows.append(
                {
                    "op": op.name,
                    "backend": name,
                    "missing": None if name == "reference" else op.backends[name].missing(),
                    "automatic_on": [device for device in chosen if chosen[device] == name],
                }
            )
    warnings = []
    if _native.missing():
        warnings.append(f"{_native.missing()}; the slow references are used")
    others = set(packages_distributions().get("plum", ())) - {"plum-sid"}
    if others:
        warnings.append(
            f"{', '.join(sorted(others))} also installs a module called `plum`; one of the two is "
            "imported by chance: use an environment of its own for plum-sid"
        )
    if os.environ.get("PLUM_CPU_ISA"):
        warnings.append(f"PLUM_CPU_ISA={os.environ['PLUM_CPU_ISA']} overrides the instruction set")
    if os.environ.get(GPU_KERNELS):
        warnings.append(f"{GPU_KERNELS}={os.environ[GPU_KERNELS]} overrides which GPU kernels run")
    return {"facts": facts, "ops": rows, "warnings": warnings}
