"""The instruction sets that the C++ kernels can be made to use here."""

from __future__ import annotations

from collections.abc import Iterator

from plum import _native


def every_isa() -> Iterator[str]:
    """Makes each instruction set of this CPU the active one in turn."""
    active = _native.build_info()["isa"]
    try:
        for isa in _native.build_info()["isas"]:
            _native.set_cpu_isa(isa)
            yield isa
    finally:
        _native.set_cpu_isa(active)
