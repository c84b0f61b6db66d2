"""The default number of threads under affinity and under the quotas of control groups."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.demo.running import ROOT
from tmexport import threads
from tmexport.threads import cpu_quota, default_threads, own_cpus, running

V1 = "{n} 24 0:{n} {root} {point} rw,nosuid - cgroup cgroup rw,{controllers}\n"
V2 = "{n} 24 0:{n} {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def lay_out(tmp_path, cgroup, mountinfo, files):
    """A /proc/self and the files of control groups below tmp_path; {t} in the texts is tmp_path."""
    place = str(tmp_path).replace(" ", "\\040")
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text("22 1 0:1 / / rw - ext4 /dev/a rw\n" + mountinfo.replace("{t}", place))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


CPU = V1.format(n=30, root="/", point="{t}/cpu", controllers="cpu,cpuacct")
CASES = {
    "v2, one CPU": ("0::/a\n", V2.format(n=29, root="/", point="{t}/g"), {"g/a/cpu.max": "100000 100000\n"}, 1.0),
    "v2, a CPU and a half": ("0::/\n", V2.format(n=29, root="/", point="{t}/g"), {"g/cpu.max": "150000 100000\n"}, 1.5),
    "v2, no limit": ("0::/a\n", V2.format(n=29, root="/", point="{t}/g"), {"g/a/cpu.max": "max 100000\n"}, None),
    "v2, the limit is two levels up": ("0::/a/b/c\n", V2.format(n=29, root="/", point="{t}/g"),
        {"g/a/cpu.max": "200000 50000\n", "g/a/b/cpu.max": "max 100000\n", "g/a/b/c/cpu.max": "800000 100000\n"}, 4.0),
    "v2, a container sees its own group as the root": ("0::/docker/1f\n", V2.format(n=29, root="/docker/1f", point="{t}/g"),
        {"g/cpu.max": "300000 100000\n"}, 3.0),
    "v2, a namespace hides the path": ("0::/../..\n", V2.format(n=29, root="/", point="{t}/g"), {"g/cpu.max": "200000 100000\n"}, 2.0),
    "v1, one CPU": ("4:cpu,cpuacct:/x\n3:memory:/y\n", CPU, {"cpu/x/cpu.cfs_quota_us": "100000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 1.0),
    "v1, no limit": ("4:cpu,cpuacct:/x\n", CPU, {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
    "v1, cpuset is no quota": ("4:cpuset:/x\n", V1.format(n=30, root="/", point="{t}/cpuset", controllers="cpuset"), {"cpuset/x/cpu.cfs_quota_us": "1\n"}, None),
    "v1, docker without a namespace": ("4:cpu:/docker/1f\n", V1.format(n=30, root="/docker/1f", point="{t}/cpu", controllers="cpu"),
        {"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 0.5),
    "both, the quota is in v1": ("4:cpu:/x\n0::/x\n", CPU + V2.format(n=31, root="/", point="{t}/u"),
        {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2.0),
    "nonsense": ("0::/a\n", V2.format(n=29, root="/", point="{t}/g"), {"g/a/cpu.max": "lots\n"}, None),
    "nothing mounted": ("0::/a\n", "", {}, None),
    "an unreadable line": ("what\n", "", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_quota_of_a_control_group(tmp_path, case):
    cgroup, mountinfo, files, wanted = CASES[case]
    (tmp_path / "a place").mkdir()
    assert cpu_quota(lay_out(tmp_path / "a place", cgroup, mountinfo, files)) == wanted


@pytest.mark.parametrize(("quota", "cores", "wanted"), [(None, 4, 4), (1.0, 4, 1), (1.5, 4, 1), (0.1, 4, 1), (3.0, 4, 3), (8.0, 4, 4)])  # fmt: skip
def test_threads_are_the_fewer_of_cores_and_quota(monkeypatch, quota, cores, wanted):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_threads() == wanted


def test_no_proc_means_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "none") is None


def test_affinity_counts():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from tmexport.threads import default_threads; print(default_threads())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_this_machine_agrees_with_its_own_kernel():
    """A real quota of one CPU, where this process may make one (root, version 1)."""
    group = Path("/sys/fs/cgroup/cpu") / f"tmexport_test_{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        assert default_threads() >= 1
        return
    try:
        code = (
            f"open('{group}/cgroup.procs', 'w').write('0'); from tmexport.threads import cpu_quota; print(cpu_quota())"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "1.0\n"
    finally:
        group.rmdir()


def a_board(root, cores, capacities=None):
    """/sys of a machine whose cores have these CPUs, and these capacities."""
    for core, cpus in enumerate(cores):
        for cpu in cpus:
            folder = root / f"sys/devices/system/cpu/cpu{cpu}"
            (folder / "topology").mkdir(parents=True)
            (folder / "topology/thread_siblings_list").write_text(",".join(map(str, cpus)) + "\n")
            if capacities:
                (folder / "cpu_capacity").write_text(f"{capacities[core]}\n")
    return root


SINGLE = [[cpu] for cpu in range(4)]
DEALT = {
    "two on two": ([[0], [1]], None, 2, [{0}, {1}]),
    "two on four: all CPUs, none twice": (SINGLE, None, 2, [{0, 2}, {1, 3}]),
    "four on four": (SINGLE, None, 4, [{0}, {1}, {2}, {3}]),
    "hardware threads stay together": ([[0, 4], [1, 5], [2, 6], [3, 7]], None, 4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
    "more threads than cores": ([[0, 2], [1, 3]], None, 4, [{0}, {1}, {2}, {3}]),
    "the fast cores are dealt first": (SINGLE, [400, 400, 1024, 1024], 2, [{2, 0}, {3, 1}]),
    "one thread": (SINGLE, None, 1, None),
    "more threads than CPUs": ([[0], [1]], None, 3, None),
}


@pytest.mark.parametrize("case", DEALT)
def test_cpus_of_their_own(tmp_path, monkeypatch, case):
    cores, capacities, number, wanted = DEALT[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {cpu for cpus in cores for cpu in cpus}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    assert own_cpus(number, a_board(tmp_path, cores, capacities)) == wanted


def test_a_quota_of_fewer_cpus_than_threads_leaves_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    assert own_cpus(2, a_board(tmp_path, SINGLE)) is None


@pytest.mark.parametrize(("text", "wanted"), [("0.43 0.27 0.75 3/104 31055\n", 3), ("nonsense", None), (None, None)])
def test_what_runs_is_read_from_the_load(tmp_path, text, wanted):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/loadavg").write_text(text)
    assert running(tmp_path) == wanted


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_a_team_binds_while_nothing_else_runs_and_the_caller_is_as_before(monkeypatch):
    from runtime_ref import team

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine gives us one CPU")
    before, seen = os.sched_getaffinity(0), {}

    def look(tid, size, sync):
        seen[tid] = os.sched_getaffinity(0)
        done.wait()

    for busy in (False, True):
        monkeypatch.setattr(team, "running", lambda busy=busy: 99 if busy else 1)
        monkeypatch.setattr(team, "LOOK", 0.0)
        done = threading.Barrier(2)
        pair = team.Team(2)
        pair.run(look)
        pair.close()
        assert bool(seen[0] & seen[1]) == busy
        assert os.sched_getaffinity(0) == before
    monkeypatch.setattr(team, "running", lambda: 1)
    done, pair = threading.Barrier(2), team.Team(2)
    pair.run(look)
    assert not seen[0] & seen[1]
    monkeypatch.setattr(team, "running", lambda: 99)  # another program starts
    pair.run(look)
    assert seen[0] == seen[1] == before
    pair.close()
