"""Measure an engine in process with the load generator of MLPerf.

    sut = Sut("fraud", samples=64, flow=lambda numbers: score(rows[list(numbers)]))
    print(server(engine, sut, rate=500, sla=Sla(deadline_ms=50), seconds=10))

LoadGen decides when queries come and judges the latencies (Reddi et al., "MLPerf Inference
Benchmark", ISCA 2020). The figures are LoadGen-based; they are no MLPerf scores, which take the
official models, data sets, run rules and review.
"""

from plinth.engine.benchmark.callers import Sut
from plinth.engine.benchmark.scenarios import Outcome, offline, server, single_stream

__all__ = ["Outcome", "Sut", "offline", "server", "single_stream"]
