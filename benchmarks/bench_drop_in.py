"""Other systems' own loops, as they are and with the change of ``docs/drop_in.md`` applied.

The codes, or the beams, of the two are asserted to be the same in more than 99 of 100 places before
anything is timed; the share is stated (near ties aside it is 1). A loop holds whatever the system
does besides: encoders, models, gradients. Rows are items encoded or requests answered.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import PeerAbsent, drop_in
from benchmarks.worker import Job

PROVIDERS = ("as it is", "plum dropped in")


@pytest.mark.parametrize("shape", drop_in.LOOPS)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
def bench_drop_in_cpu(benchmark, full, budget, threads, provider, shape):
    sizes = drop_in.FULL if full else drop_in.Sizes()
    changed = provider == "plum dropped in"
    try:
        loop = drop_in.LOOPS[shape](changed, sizes)
        expected = drop_in.LOOPS[shape](not changed, sizes).run()
    except (PeerAbsent, ImportError) as error:
        pytest.skip(str(error))

    def check(found: Tensor) -> float:
        assert found.shape == expected.shape
        share = (found.long() == expected.long()).all(dim=-1).double().mean().item()
        assert share > 0.99, share
        return share

    benchmark.group = f"drop_in, {shape}"
    # The loops are long; a few rounds of the slowest too.
    share = measure(benchmark, Job(loop.run), 5 * budget, check)
    record(
        benchmark,
        loop.rows,
        operations=loop.operations,
        nbytes=loop.nbytes,
        ceiling=ceiling("cpu"),
        share_equal=share,
    )
