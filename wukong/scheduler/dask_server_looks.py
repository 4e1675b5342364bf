"""How the server's work looks: the task stream, the performance report, a page with counters.

All of it is made from the records that executors' commits carry. Tasks are recorded one by one
from when somebody first asks for the stream; before that they are only counted.
"""

from __future__ import annotations

import html
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes, format_time, key_split, parse_timedelta
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from wukong import trace

if TYPE_CHECKING:
    from wukong.scheduler.dask_server import DaskServer

STREAM_TASKS = 100_000
"""The newest tasks are kept."""
DRAWN_TASKS = 20_000
"""So many bars are drawn in a report; of more, the longest."""
PORT = 8787
"""Where Dask users look for a page; another port is taken if somebody has it."""
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")

_STYLE = (
    "<meta charset='utf-8'><style>body{font:14px sans-serif;margin:2em}td,th{text-align:left;"
    "padding:2px 12px 2px 0}pre{background:#f4f4f4;padding:8px}</style>"
)


class Looks:
    """The handlers, and the page; for the loop's thread."""

    def __init__(self, server: DaskServer) -> None:
        self._server = server
        self._tasks: deque[dict[str, Any]] = deque(maxlen=STREAM_TASKS)
        self._n_recorded = 0
        self._is_recording = False
        self.n_tasks = 0
        """Tasks that have run since the server began."""
        self.n_runs = 0
        """Strands, or pieces of them, that have been committed."""
        self.busy_s: dict[str, float] = defaultdict(float)
        """Executor -> seconds in tasks."""
        self._page: HTTPServer | None = None
        server.handlers.update(
            {
                "get_task_stream": self.task_stream,
                "get_task_stream_index": self.task_stream_index,
                "performance_report": self.performance_report,
            }
        )

    # -------------------------------------------------------------- records

    def take(self, records: Sequence[trace.RunRecord]) -> None:
        """Note what executors have run."""
        for record in records:
            self.n_runs += 1
            self.n_tasks += len(record.tasks) // 4  # they are int32
            self.busy_s[record.holder] += record.ran_at - record.fetched_at
            if self._is_recording:
                self._note_tasks(record)

    def _note_tasks(self, record: trace.RunRecord) -> None:
        begun_s = 0.0
        for task, ended_s in zip(trace.ints(record.tasks), trace.floats(record.ended_s)):
            entry = self._server.futures.entry_of(task)
            self._n_recorded += 1
            self._tasks.append(
                {
                    "key": f"task-{task}" if entry is None else entry.key,
                    "worker": record.holder,
                    "thread": 0,
                    "type": None,
                    "nbytes": 0 if entry is None else max(0, entry.size_bytes),
                    "status": "OK",
                    "startstops": (
                        {
                            "action": "compute",
                            "start": record.fetched_at + begun_s,
                            "stop": record.fetched_at + ended_s,
                        },
                    ),
                }
            )
            begun_s = ended_s

    def task_stream_index(self) -> int:
        """How many tasks have been recorded: where the next stream begins."""
        self._is_recording = True
        return self._n_recorded

    def task_stream(
        self,
        start: str | float | None = None,
        stop: str | float | None = None,
        count: int | None = None,
        start_index: int | None = None,
    ) -> list[dict[str, Any]]:
        """Tasks that ended between two times, or from an index on; of them the newest `count`."""
        self._is_recording = True
        tasks = list(self._tasks)
        if start_index is not None:
            return tasks[max(0, start_index - (self._n_recorded - len(tasks))) :]
        since, until = _moment(start, 0.0), _moment(stop, float("inf"))
        found = [task for task in tasks if since <= task["startstops"][0]["stop"] <= until]
        return found if count is None else found[max(0, len(found) - count) :]

    # -------------------------------------------------------------- the report

    def performance_report(
        self, start: float, last_count: int = 0, code: str = "", mode: object = None
    ) -> str:
        """An HTML page of what ran since `start`, with the code that asked for it."""
        tasks = self.task_stream(start=start)
        wall_s = time.time() - start
        busy_s: dict[str, float] = defaultdict(float)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for task in tasks:
            seconds = _seconds(task)
            busy_s[task["worker"]] += seconds
            by_kind[str(key_split(task["key"]))].append(seconds)
        facts = {
            "Duration": format_time(wall_s),
            "Tasks": len(tasks),
            "Executors that worked": len(busy_s),
            "Time in tasks": format_time(sum(busy_s.values())),
            "Futures now": len(self._server.tasks),
        }
        slowest = sorted(tasks, key=_seconds, reverse=True)[:20]
        kinds = sorted(by_kind.items(), key=lambda item: -sum(item[1]))[:30]
        parts = [
            f"<!DOCTYPE html><html><head><title>Wukong performance report</title>{_STYLE}</head>",
            "<body><h1>Performance report</h1>",
            _table(("", ""), facts.items()),
            "<h2>Timeline</h2>",
            _timeline(tasks, start),
            "<h2>Functions</h2>",
            _table(
                ("Name", "Calls", "Total", "Mean"),
                (
                    (name, len(took), format_time(sum(took)), format_time(sum(took) / len(took)))
                    for name, took in kinds
                ),
            ),
            "<h2>Slowest tasks</h2>",
            _table(
                ("Key", "Executor", "Time"),
                ((task["key"], task["worker"], format_time(_seconds(task))) for task in slowest),
            ),
            f"<h2>Calling code</h2><pre>{html.escape(code)}</pre></body></html>",
        ]
        return "".join(parts)

    # -------------------------------------------------------------- the page

    def open_page(self, host: str) -> int:
        """Serve the page with the counters. Returns: its port."""
        looks = self

        class Page(RequestHandler):
            def get(self) -> None:
                self.write(looks.counters_page())

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host.strip("[]"), PORT), family=family)
        except OSError:  # somebody has it; any other will do
            listening = socket.create_server((host.strip("[]"), 0), family=family)
        listening.setblocking(False)
        self._page = HTTPServer(Application([("/", Page), ("/status", Page)]))
        self._page.add_sockets([listening])
        return int(listening.getsockname()[1])

    def close_page(self) -> None:
        """Serve it no more."""
        if self._page is not None:
            self._page.stop()

    def counters_page(self) -> str:
        """The page: plain counters, drawn anew every second."""
        server = self._server
        states = Counter(entry.state for entry in server.tasks.values())
        n_bytes = sum(max(0, entry.size_bytes) for entry in server.tasks.values())
        facts: dict[str, Any] = {
            "Server": server.address,
            "Up": format_time(time.time() - server.started_at),
            "Executors": server.n_executors,
            "Clients": len(server.client_comms),
            "Futures that wait": states["processing"],
            "Futures that are there": states["memory"],
            "Futures with errors": states["erred"],
            "Bytes of futures": format_bytes(n_bytes),
            "Tasks run": self.n_tasks,
            "Strands committed": self.n_runs,
        }
        busy = sorted(self.busy_s.items())
        return (
            f"<!DOCTYPE html><html><head><title>Wukong</title>{_STYLE}"
            "<meta http-equiv='refresh' content='1'></head><body><h1>Wukong</h1>"
            + _table(("", ""), facts.items())
            + "<h2>Time in tasks</h2>"
            + _table(("Executor", "Time"), ((name, format_time(s)) for name, s in busy))
            + "</body></html>"
        )


def _moment(when: str | float | None, default: float) -> float:
    if isinstance(when, str):
        return time.time() - float(parse_timedelta(when) or 0.0)
    return default if when is None else when


def _seconds(task: Mapping[str, Any]) -> float:
    span = task["startstops"][0]
    return float(span["stop"] - span["start"])


def _table(head: Sequence[str], rows: Any) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{body}</table>"


def _timeline(tasks: Sequence[Mapping[str, Any]], start: float) -> str:
    """Bars of tasks, one row for each executor; a colour for each function."""
    if not tasks:
        return "<p>No task has run.</p>"
    drawn = sorted(tasks, key=_seconds, reverse=True)[:DRAWN_TASKS]
    rows = {worker: i for i, worker in enumerate(sorted({t["worker"] for t in tasks}))}
    end = max(task["startstops"][0]["stop"] for task in tasks)
    scale = 1000.0 / max(end - start, 1e-9)
    kinds: dict[str, str] = {}
    bars = []
    for task in drawn:
        kind = str(key_split(task["key"]))
        color = kinds.setdefault(kind, COLORS[len(kinds) % len(COLORS)])
        x = (task["startstops"][0]["start"] - start) * scale
        bars.append(
            f"<rect x='{x:.2f}' y='{22 * rows[task['worker']]}' height='20' "
            f"width='{max(0.3, _seconds(task) * scale):.2f}' fill='{color}'>"
            f"<title>{html.escape(str(task['key']))}: {format_time(_seconds(task))}</title></rect>"
        )
    height = 22 * len(rows)
    return f"<svg width='100%' viewBox='0 0 1000 {height}'>{''.join(bars)}</svg>"
