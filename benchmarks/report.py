"""Turns a pytest-benchmark JSON file into Markdown tables: a row a provider, ratios to plum.

Usage: python benchmarks/report.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def tables(results: dict) -> str:
    """Returns one Markdown table per benchmark group."""
    machine = results["machine_info"]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items() if value), ""]
    groups = defaultdict(list)
    for bench in results["benchmarks"]:
        groups[bench["group"]].append(bench)
    for group, benches in groups.items():
        rate = {b["params"]["provider"]: b["extra_info"]["rows_per_second"] for b in benches}
        ours = max(value for name, value in rate.items() if not name.startswith(PEERS))
        lines += [
            f"**{group}**",
            "",
            "| provider | million rows/s | plum / it |",
            "| --- | ---: | ---: |",
        ]
        for name, value in sorted(rate.items(), key=lambda pair: -pair[1]):
            lines.append(f"| {name} | {value / 1e6:.3g} | {ours / value:.3g} |")
        lines.append("")
    return "\n".join(lines)


# How the names of providers begin that are not plum's own kernels.
PEERS = ("torch", "numpy", "faiss", "vector-quantize", "plum reference", "reference")


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
