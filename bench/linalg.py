"""The paper's six workloads at full size, their graphs optimised before the clock starts."""

from collections.abc import Iterable

from bench.measure import Built, Case
from wukong.workloads import WORKLOADS, Prepared, Problem, Workload, prepare


def cases(names: Iterable[str] = (), full: bool = True) -> list[Case]:
    """The workloads as cases; each is built here, once.

    Args:
        names: short names of the workloads that are wanted, all if empty.
        full: full size, or that of the demo.
    """
    wanted = {name.lower() for name in names}
    return [
        _case(workload, full)
        for workload in WORKLOADS
        if not wanted or workload.name.lower() in wanted
    ]


def _case(workload: Workload, full: bool) -> Case:
    problem = workload.build(full)
    prepared = prepare(problem)
    small = prepared if not full else prepare(workload.build(False))

    def build(_: str) -> Built:
        # The keys are the same each time: sides settle, so no result of an earlier run is found.
        return prepared.graph, prepared.keys

    def warm() -> Built:
        return small.graph, small.keys

    def check(result: object) -> None:
        _check(workload.name, problem, prepared, result)

    return Case(workload.name, len(prepared.graph), build, check, warm=warm)


def _check(name: str, problem: Problem, prepared: Prepared, result: object) -> None:
    assert isinstance(result, list | tuple)
    for check in problem.check(prepared.finish(result)):
        assert check.passed, f"{name}, {check.what}: {check.error} > {check.tolerance}"
