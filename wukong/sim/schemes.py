"""Other ways to run a graph over the same stores and executors, to compare ideas and not programs.

Each takes away what it had not: `wukong2020` (Carver et al., SoCC '20) has no atomic commit, but a
set for each output and an increment for each edge of a fan-in; `numpywren` (Shankar et al., SoCC
'20) has a queue of tasks, and every value in the object store; `pywren` (Jonas et al., SoCC '17)
maps one stage after the other from the client; `strawman` is the first design of SoCC '20, section
3.1: the client runs every task as one invocation.

None is made slower than it has to be: the sets of one commit share one round trip, and so do the
increments; clients and queues cost what the platform's table says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wukong.executor.work import Policy


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to run graphs."""

    name: str
    strands: bool = True
    """Tasks are cut into strands; off: each is one, and chains are."""
    chains: bool = True
    """Without strands, a task whose only input has no other reader belongs to it."""
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


OURS = Scheme("wukong")
WUKONG2020 = Scheme("wukong2020", strands=False, split=False, edge_operations=True)
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
