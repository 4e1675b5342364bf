"""Real faults: executors and clients that are killed or stopped, blobs that are lost, Ctrl-C.

One text for every kind of store (`fault_places`): `make test` has all of it in shared memory and a
sample elsewhere, `make test-full` all of it everywhere.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import dask
import fault_tasks as tasks
import psutil
import pytest
from click.testing import CliRunner
from fault_places import KINDS, Damage, Place, open_place

import wukong
from wukong import cli, errors
from wukong.executor.messages import JobId

SOON_S = 20.0
"""Far more than any wait below takes, and far less than a hang."""
SEED = 20_200_113


def wait_until(is_true, timeout_s: float = SOON_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.005)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test in all kinds of places; `make test` has them in shared memory."""
    if "shared_place" not in metafunc.fixturenames:
        return
    kinds = [pytest.param(k, marks=() if k == "shared memory" else pytest.mark.full) for k in KINDS]
    metafunc.parametrize("shared_place", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def shared_place(request):
    place = open_place(request.param, lambda: request.getfixturevalue("moto_url"))
    yield place
    place.remove()


@pytest.fixture
def place(shared_place):
    """A place without jobs, whatever became of the last test."""
    yield shared_place
    with shared_place.opened() as store:
        for job in store.jobs.jobs():
            store.jobs.forget(job)
            store.blobs.delete_job(job)


@pytest.fixture
def cluster(place):
    """Two processes; afterwards the pool works, and the store is empty."""
    with place.cluster(2, timeout_s=60) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        yield cluster
        assert cluster.get({"alive": (tasks.increment, 1)}, "alive", timeout_s=SOON_S) == 2
        assert cluster.jobs() == ()
    assert place.left() == []


# ---------------------------------------------------------------- tasks that kill executors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exit at once", "exited with status 7"),
        ("segfault", "SIGSEGV"),
        ("killed", "SIGKILL, as the system does when memory runs out"),
    ],
)
@pytest.mark.parametrize("n_others", [0, 999])
def test_a_task_that_kills_its_executors_is_named(cluster, place, how, says, n_others) -> None:
    graph = {("x", i): (tasks.increment, i) for i in range(n_others)}
    graph |= {"before": (tasks.increment, 1), "it": (tasks.go_wrong, how, "before")}
    graph["behind"] = (tasks.increment, "it")
    begun_at = time.monotonic()
    with pytest.raises(errors.TaskError, match=f"killed its executor 3 times.*{says}") as caught:
        cluster.get(graph, list(graph))
    assert time.monotonic() - begun_at < 3 * place.patience
    assert caught.value.__notes__ == ["Raised by the task 'it'"]


@pytest.mark.slow
@pytest.mark.parametrize("n_deaths", [1, 2])
def test_a_task_may_lose_an_executor_or_two(cluster, tmp_path, n_deaths) -> None:
    graph = {("x", i): (tasks.increment, i) for i in range(50)}
    graph["it"] = (tasks.die_at_first, str(tmp_path), "runs", n_deaths, ("x", 0))
    assert cluster.get(graph, ["it", ("x", 49)]) == (1, 50)
    assert tasks.runs(tmp_path) == {"runs": n_deaths + 1}
    report = cluster.report()
    assert report.deaths == n_deaths
    assert "died before" in report.story("it")


# ---------------------------------------------------------------- executors that are killed


def kill_at(cluster, rng: random.Random, times_s: list[float], over: threading.Event) -> int:
    """Kill some executor at each of the times, until the job is over. Returns: how many."""
    n_killed, now_s = 0, 0.0
    for time_s in sorted(times_s):
        if over.wait(time_s - now_s):
            break
        now_s = time_s
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(cluster._pool.pids), signal.SIGKILL)
            n_killed += 1
    return n_killed


def storm(cluster, n_jobs: int, duration_s: float) -> dict[str, float]:
    """Jobs of 511 tasks, with three kills at random moments of each. Returns: what was seen."""
    graph = {("x", i): (tasks.sleep_and_add, duration_s, i) for i in range(256)}
    for i in range(255):
        graph["y", i] = (tasks.sleep_and_add, duration_s, ("x", i), ("x", i + 1))
    wanted = tuple(2 * i + 1 for i in range(255))
    keys = [("y", i) for i in range(255)]
    calm_s = []
    for _ in range(3):
        begun_at = time.monotonic()
        assert cluster.get(graph, keys) == wanted
        calm_s.append(time.monotonic() - begun_at)
    rng, took_s, n_kills, n_deaths = random.Random(SEED), [], 0, 0
    for _ in range(n_jobs):
        over = threading.Event()
        times_s = [rng.uniform(0, min(calm_s)) for _ in range(3)]
        with concurrent.futures.ThreadPoolExecutor(1) as killer:
            kills = killer.submit(kill_at, cluster, rng, times_s, over)
            begun_at = time.monotonic()
            try:
                assert cluster.get(graph, keys) == wanted
            finally:
                over.set()
            took_s.append(time.monotonic() - begun_at)
            n_kills += kills.result(SOON_S)
        n_deaths += cluster.report().deaths
    return {
        "jobs": n_jobs,
        "kills": n_kills,
        "deaths": n_deaths,
        "calm_s": min(calm_s),
        "median_s": sorted(took_s)[n_jobs // 2],
        "worst_s": max(took_s),
    }


def check_storm(cluster, place: Place, n_jobs: int) -> None:
    before = own_shared_files()
    found = storm(cluster, n_jobs, 0.001)
    logging.getLogger(__name__).info("%s", json.dumps(found))
    assert found["kills"] >= 2.5 * n_jobs
    assert found["worst_s"] - found["calm_s"] < 2.0 * place.patience, found
    assert own_shared_files() <= before


def own_shared_files() -> set[str]:
    """Files in shared memory, without those of other programs on this machine."""
    return {name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name}


@pytest.mark.slow
def test_jobs_survive_a_few_random_kills(cluster, place) -> None:
    check_storm(cluster, place, 2)


@pytest.mark.slow
def test_jobs_survive_random_kills(cluster, place) -> None:
    check_storm(cluster, place, 20)


@pytest.mark.full
def test_two_hundred_jobs_survive_random_kills(cluster, place) -> None:
    check_storm(cluster, place, 200)


@pytest.mark.slow
def test_a_kill_costs_the_work_lost_and_little_more(cluster, place, tmp_path) -> None:
    graph = {("x", i): (tasks.counted_sum, str(tmp_path), i, 0.02, i) for i in range(200)}
    keys = list(graph)
    cluster.get(graph, keys)
    begun_at = time.monotonic()
    cluster.get(graph, keys)
    calm_s = time.monotonic() - begun_at
    killer = threading.Timer(calm_s / 2, lambda: os.kill(cluster._pool.pids[0], signal.SIGKILL))
    n_before = sum(tasks.runs(tmp_path).values())
    killer.start()
    begun_at = time.monotonic()
    assert cluster.get(graph, keys) == tuple(range(1, 201))
    took_s = time.monotonic() - begun_at
    killer.join()
    lost_s = 0.02 * (sum(tasks.runs(tmp_path).values()) - n_before - 200)
    assert cluster.report().deaths == 1
    assert took_s - calm_s - lost_s < 0.5 * place.patience


@pytest.mark.slow
def test_of_a_stopped_executor_and_its_successor_the_first_to_commit_wins(place, tmp_path) -> None:
    graph = {("x", i): (tasks.counted_sum, str(tmp_path), i, 0.2, i) for i in range(8)}
    with (
        dask.config.set({"wukong.job.silence-s": 1.0, "wukong.executor.heartbeat-s": 0.2}),
        place.cluster(2, timeout_s=60) as cluster,
    ):
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        stopped = cluster._pool.pids[0]

        def stop_and_continue() -> None:
            wait_until(lambda: len(tasks.runs(tmp_path)) >= 2)
            os.kill(stopped, signal.SIGSTOP)
            time.sleep(2.5)
            os.kill(stopped, signal.SIGCONT)

        stopper = threading.Thread(target=stop_and_continue)
        stopper.start()
        assert cluster.get(graph, list(graph)) == tuple(range(1, 9))
        report = cluster.report()
        stopper.join()
        # Where stores are far away it may have held the next one, too.
        assert report.deaths in (1, 2)
        assert sum(tasks.runs(tmp_path).values()) > 8
        # The one that was stopped goes on, is refused, and serves again.
        assert cluster.get(dict.fromkeys(range(4), (tasks.sleep, 0.1)), [0, 1, 2, 3])
        assert stopped in cluster._pool.pids
        assert cluster.jobs() == ()


@pytest.mark.slow
def test_a_straggler_is_overtaken_by_its_second_start(place, tmp_path) -> None:
    graph = {("x", i): (tasks.sleep, 0.05) for i in range(60)}
    graph["late"] = (tasks.sleep_at_first, str(tmp_path), "runs", 12.0)
    settings = {
        "wukong.job.speculate": True,
        "wukong.job.silence-s": 1.0,
        "wukong.executor.heartbeat-s": 0.2,
    }
    with dask.config.set(settings), place.cluster(2, timeout_s=60) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        begun_at = time.monotonic()
        assert cluster.get(graph, ["late", *(("x", i) for i in range(60))])[0] == 2
        assert time.monotonic() - begun_at < 8
        assert cluster.report().deaths == 0


# ---------------------------------------------------------------- clients that are interrupted


def start_script(source: str, *arguments: object) -> subprocess.Popen:
    path = [str(Path(wukong.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 0])
def test_ctrl_c_cancels_the_job_and_leaves_a_usable_cluster(place, tmp_path, processes) -> None:
    script = start_script(
        """
        import json, signal, sys, time, fault_tasks as tasks, wukong
        # A shell has its background jobs ignore it, and so what they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder, processes = sys.argv[1], bool(int(sys.argv[2]))
        with wukong.LocalCluster(2, processes, **json.loads(sys.argv[3])) as cluster:
            graph = {("x", i): (tasks.counted_sum, folder, i, 5, i) for i in range(20)}
            try:
                cluster.get(graph, list(graph))
            except KeyboardInterrupt:
                print("interrupted", cluster.jobs(), flush=True)
            begun_at = time.monotonic()
            print(cluster.get({i: (tasks.sleep, 0.2) for i in range(4)}, list(range(4))))
            print(time.monotonic() - begun_at < 4.5)
        """,
        tmp_path,
        processes,
        json.dumps(place.options),
    )
    wait_until(lambda: len(tasks.runs(tmp_path)) >= 2)
    script.send_signal(signal.SIGINT)
    out, _ = script.communicate(timeout=SOON_S)
    assert out.splitlines() == ["interrupted ()", "(0.2, 0.2, 0.2, 0.2)", "True"]
    assert script.returncode == 0
    assert sum(tasks.runs(tmp_path).values()) == 2
    assert place.left() == []


# A callback of the garbage collector, which distributed installs, may be what is interrupted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [True, False])
def test_ctrl_c_may_come_at_any_moment(place, processes) -> None:
    graph = {("x", i): (tasks.increment, i) for i in range(500)}
    rng = random.Random(SEED)
    n_interrupted = 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with place.cluster(2, processes=processes, timeout_s=SOON_S) as cluster:
            for _ in range(40):
                with contextlib.suppress(KeyboardInterrupt):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.03))
                        for _ in range(100):
                            cluster.get(graph, list(graph))
                    finally:
                        n_interrupted += 1
                assert cluster.get(graph, list(graph)) == tuple(range(1, 501))
            assert n_interrupted == 40
            assert cluster.jobs() == ()
        assert place.left() == []
    finally:
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- clients that are killed


CLIENT = """
    import json, sys, fault_tasks as tasks, wukong
    options, folder, duration_s = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    with wukong.LocalCluster(2, **options) as cluster:
        cluster.get({"warm": (tasks.sleep, 0.1), "too": (tasks.sleep, 0.1)}, ["warm", "too"])
        cluster.jobs()  # until here, the rows of the small job may have stayed
        print("ready", flush=True)
        graph = {("x", i): (tasks.counted_sum, folder, i, duration_s, i) for i in range(64)}
        cluster.get(graph, list(graph))
"""


def kill_client(place: Place, folder: Path, duration_s: float, n_runs: int) -> JobId:
    """Kill a client in mid-job, and wait for its executors. Returns: the job."""
    script = start_script(CLIENT, json.dumps(place.options), folder, duration_s)
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    wait_until(lambda: len(tasks.runs(folder)) >= n_runs)
    executors = psutil.Process(script.pid).children(recursive=True)
    assert len(executors) == 3  # and their zygote
    script.kill()
    script.communicate(timeout=SOON_S)
    assert psutil.wait_procs(executors, timeout=5.0)[1] == []
    with place.opened() as store:
        (job,) = store.jobs.jobs()
        return job


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("duration_s", [0.002, 0.05, 0.5])
def test_a_job_whose_client_is_killed_can_be_attached_to(place, folder, duration_s) -> None:
    job = kill_client(place, folder, duration_s, 10 if duration_s < 0.5 else 2)
    n_before = len(tasks.runs(folder))
    assert 2 <= n_before < 64
    assert place.attach(job) == tuple(range(1, 65))
    # What was running when the client died has been committed too, so that nothing runs twice.
    assert set(tasks.runs(folder).values()) == {1}
    with pytest.raises(errors.JobNotFound):
        place.attach(job)
    assert place.left() == []


@pytest.mark.slow
def test_a_long_task_is_run_again_but_not_what_was_done_before_it(place, folder) -> None:
    script = start_script(
        """
        import json, sys, fault_tasks as tasks, wukong
        with wukong.LocalCluster(1, **json.loads(sys.argv[1])) as cluster:
            took_s = [0] * 30 + [30] + [0] * 9
            graph = {("x", i): (tasks.counted_sum, sys.argv[2], i, took_s[i]) for i in range(40)}
            cluster.get(graph, list(graph))
        """,
        json.dumps(place.options),
        folder,
    )
    wait_until(lambda: "30" in tasks.runs(folder))
    n_before = len(tasks.runs(folder))
    executors = psutil.Process(script.pid).children(recursive=True)
    script.kill()
    script.communicate(timeout=SOON_S)
    assert psutil.wait_procs(executors, timeout=5.5)[1] == []
    with place.opened() as store:
        (job,) = store.jobs.jobs()
        view = store.jobs.view(job)
        store.jobs.forget(job)
    assert view is not None
    assert (view.n_tasks_done, view.n_running) == (n_before - 1, 0)


@pytest.mark.slow
def test_the_sweeper_wakes_a_pool_for_a_job_without_client(place, folder) -> None:
    def sweep():
        return CliRunner().invoke(cli.main, ["sweep", place.where, "--once"])

    job = kill_client(place, folder, 0.02, 10)
    run = sweep()
    assert run.exit_code == 0
    assert f"job {job}: running" in run.output
    assert "no executors wait there" in run.output
    with place.cluster(1) as cluster:
        cluster._pool.ready(SOON_S)
        # Where the store is far away, a pool listens to it some time after its start.
        wait_until(lambda: "pools woken: 1" in (run := sweep()).output or "done" in run.output)
        wait_until(lambda: cluster._store.jobs.view(job).status == 2)
        assert f"job {job}: done, 64 of 64 tasks done" in sweep().output
        assert cluster.attach(job) == tuple(range(1, 65))


def test_the_sweeper_says_that_there_is_no_store(tmp_path) -> None:
    run = CliRunner().invoke(cli.main, ["sweep", str(tmp_path), "--once"])
    assert run.exit_code == 1
    assert "there is no job store" in run.output
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- blobs that are lost


def remove(content: bytes) -> bytes | None:
    return None


def truncate(content: bytes) -> bytes | None:
    return content[: len(content) // 2]


def alter(content: bytes) -> bytes | None:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [remove, truncate, alter])
def test_a_lost_blob_is_made_again(cluster, place, folder, damage: Damage) -> None:
    size = 300_000
    graph = {("x", i): (tasks.ones_after, str(folder), i, size) for i in range(8)}
    graph["wait"] = (tasks.wait_for, str(folder / "go"))
    graph["it"] = (tasks.n_bytes_after, "wait", *[("x", i) for i in range(8)])

    def damage_one() -> None:
        wait_until(lambda: len(tasks.runs(folder)) == 8 and place.large_values())
        time.sleep(0.3)
        place.damage(place.large_values()[0], damage)
        (folder / "go").touch()

    damager = threading.Thread(target=damage_one)
    damager.start()
    assert cluster.get(graph, "it") == 8 * size
    damager.join(SOON_S)
    runs = tasks.runs(folder)
    assert runs.pop("go") == 0
    assert 8 < sum(runs.values()) <= 16
