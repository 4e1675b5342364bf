"""The store of a simulated world with an open job."""

from __future__ import annotations

from collections.abc import Sequence

from wukong.executor.messages import (
    BlobId,
    ExportId,
    Extend,
    Invocation,
    Located,
    News,
    Refused,
    StrandId,
)
from wukong.sim.store import SimStore
from wukong.storage import extension


class OpenSimStore(SimStore):
    """The job store and the blob store of one open job."""

    def extend(self, request: Extend) -> tuple[Invocation, ...] | Refused:
        """See `JobStore.extend`."""
        before = self._generation()
        reply = extension.extend(self.rows, request, self.world.now)
        checker = self.world.checker
        if checker is not None:
            if self._generation() != before:
                checker.restarted(self.rows.tables)
            checker.check_rows(self.rows.tables)
        self._changed()
        return reply

    def unpin(self, exports: Sequence[ExportId]) -> None:
        """See `JobStore.unpin`."""
        extension.unpin(self.rows, exports)
        self._check()

    def drop(self, strands: Sequence[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
        """See `JobStore.drop`."""
        extension.drop(self.rows, strands)
        self._check()

    def _check(self) -> None:
        if self.world.checker is not None:
            self.world.checker.check_rows(self.rows.tables)
        self._changed()

    def news(self, acknowledged: Sequence[str], collected: Sequence[BlobId]) -> News:
        """See `JobStore.news`."""
        reply = extension.news(self.rows, acknowledged, collected)
        self._changed()
        return reply

    def free(self, blobs: Sequence[BlobId]) -> None:
        """Delete blobs of exports that stay: of values that nobody is ever to read again."""
        self.freed.update(blobs)
        self.delete(blobs)

    def located(self, exports: Sequence[ExportId]) -> tuple[Located, ...]:
        """See `JobStore.located`."""
        return extension.located(self.rows, exports)
