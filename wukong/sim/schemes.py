"""Other ways to run a graph over the same stores and executors, to compare ideas and not programs.

Each takes away what it had not: `wukong2020` (Carver et al., SoCC '20) has no atomic commit, but a
set for each output and an increment for each edge of a fan-in; `numpywren` (Shankar et al., SoCC
'20) has a queue of tasks, and every value in the object store; `pywren` (Jonas et al., SoCC '17)
maps one stage after the other from the client; `strawman` is the first design of SoCC '20, section
3.1: the client runs every task as one invocation.

None is made slower than it has to be: the sets of one commit share one round trip, and so do the
increments; clients and queues cost what the platform's table says. `bench baselines` runs the same
schemes on the real store and executors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wukong.executor.messages import Commit
from wukong.executor.work import Policy
from wukong.scheduler.strands import Strands, pack_strands

CLUSTER_BYTES = 1024 * 1024
"""The rule is the paper's task clustering, the threshold ours: that of delayed I/O."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to run graphs."""

    name: str
    strands: bool = True
    """Tasks are cut into strands; off: each is one, and chains are."""
    chains: bool = True
    """Without strands, a task whose only input has no other reader belongs to it."""
    cluster_bytes: int | None = None
    """Without strands, a task that reads one value of this size or more belongs to its maker,
    whoever else reads it: the value is not moved to those that could begin elsewhere."""
    become: bool = True
    """An executor goes on with a strand that its commit has minted."""
    split: bool = True
    absorb: bool = True
    """Delayed I/O."""
    inline: bool = True
    """Small values travel in commits and receipts; off: every value is an object of its own."""
    edge_operations: bool = False
    """A set for each output, an increment for each edge of a fan-in, a get for each input."""
    client_invokes: bool = False
    """Executors do not invoke: the client sees what can begin, and invokes it."""
    staged: bool = False
    """The client invokes when all that it has invoked before has ended."""

    def policy(self, policy: Policy) -> Policy:
        """What the scheme makes of an executor's policy."""
        return replace(
            policy,
            become=self.become,
            split=policy.split and self.split,
            absorb_bytes=policy.absorb_bytes if self.absorb else 0,
            inline_bytes=policy.inline_bytes if self.inline else 0,
            blob_bytes=policy.blob_bytes if self.inline else 1,
        )

    def sets_and_increments(self, commit: Commit) -> tuple[int, int]:
        """How many of each say the same as a commit; (0, 0): it is one operation.

        First come all sets, in one round trip, then all increments, of edges of fan-ins only. What
        is a blob has been put, and is not set besides.
        """
        if not self.edge_operations:
            return 0, 0
        sets = [o for o in commit.outputs if any(entry.blob is None for entry in o.entries)]
        return len(sets), sum(f.n_inputs > 1 for output in commit.outputs for f in output.feeds)


OURS = Scheme("wukong")
WUKONG2020 = Scheme(
    "wukong2020",
    strands=False,
    split=False,
    edge_operations=True,
    cluster_bytes=CLUSTER_BYTES,
)
NUMPYWREN = Scheme(
    "numpywren",
    strands=False,
    chains=False,
    become=False,
    split=False,
    absorb=False,
    inline=False,
)
PYWREN = replace(NUMPYWREN, name="pywren", client_invokes=True, staged=True)
STRAWMAN = replace(NUMPYWREN, name="strawman", inline=True, client_invokes=True)
ABLATIONS = (
    replace(OURS, name="without strands", strands=False),
    replace(OURS, name="without splitting", split=False),
    replace(OURS, name="without delayed I/O", absorb=False),
    replace(OURS, name="without inline values", inline=False),
)
BASELINES = (WUKONG2020, NUMPYWREN, PYWREN, STRAWMAN)
SCHEMES = {scheme.name: scheme for scheme in (OURS, *ABLATIONS, *BASELINES)}


def cut_by_scheme(
    scheme: Scheme,
    inputs_ptr: NDArray[np.integer],
    inputs: NDArray[np.integer],
    requested: Iterable[int],
    sizes_bytes: Sequence[int],
) -> Strands:
    """Make every task a strand of its own; where the scheme says so, every chain and cluster.

    Args:
        inputs_ptr: (n + 1,) task t reads inputs[inputs_ptr[t]:inputs_ptr[t + 1]].
        inputs: ids of tasks, each smaller than its reader's.
        requested: tasks whose values the client reads.
        sizes_bytes: of each task's value (n).
    """
    requested = list(requested)
    n_tasks = len(inputs_ptr) - 1
    ends, sources = inputs_ptr.tolist(), inputs.tolist()
    n_readers = np.bincount(inputs, minlength=n_tasks)
    n_readers[requested] += 1
    least = scheme.cluster_bytes
    strand_of = np.zeros(n_tasks, np.int64)
    n_strands = 0
    for task in range(n_tasks):
        first, end = ends[task], ends[task + 1]
        source = sources[first] if end - first == 1 else -1
        is_chain = scheme.chains and source >= 0 and n_readers[source] == 1
        if is_chain or (least is not None and source >= 0 and sizes_bytes[source] >= least):
            strand_of[task] = strand_of[source]
        else:
            strand_of[task] = n_strands
            n_strands += 1
    return pack_strands(inputs_ptr, inputs, requested, strand_of)
