"""A step runs once; it runs again exactly when its command, an input or an output has changed; it can be interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.demo.steps import Records, Step, StepFailedError, content_hash, duration, run_step

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Appends a letter to the log for every run, and writes the upper case of the input to the output.
WORK = "import sys; i, o, log = sys.argv[1:4]; open(log, 'a').write('x'); open(o, 'w').write(open(i).read().upper())"


@pytest.fixture
def world(tmp_path):
    (tmp_path / "in.txt").write_text("text")
    return tmp_path


def a_step(world, *more):
    command = ("python", "-c", WORK, str(world / "in.txt"), str(world / "out.txt"), str(world / "log"), *more)
    return Step("work", command, (world / "in.txt",), (world / "out.txt",))


def run(step, world):
    said = []
    run_step(step, Records(world / "steps"), said.append)
    return said[-1]


def test_runs_once_and_is_then_reused(world):
    assert run(a_step(world), world).startswith("done in ")
    assert (world / "out.txt").read_text() == "TEXT"
    assert run(a_step(world), world).startswith("unchanged, reused")
    assert (world / "log").read_text() == "x"


@pytest.mark.parametrize(
    "change",
    [
        lambda world: (world / "in.txt").write_text("other"),
        lambda world: (world / "out.txt").unlink(),
        lambda world: (world / "out.txt").write_text("TEXt"),
        lambda world: (world / "steps" / "work.json").unlink(),
        lambda world: (world / "steps" / "work.json").write_text("[1, 2"),
    ],
    ids=["input", "output gone", "output altered", "no record", "broken record"],
)
def test_runs_again_after_a_change(world, change):
    run(a_step(world), world)
    change(world)
    assert run(a_step(world), world).startswith("done in ")
    assert (world / "out.txt").read_text() == (world / "in.txt").read_text().upper()
    assert (world / "log").read_text() == "xx"


def test_runs_again_with_another_command(world):
    run(a_step(world), world)
    assert run(a_step(world, "one more word"), world).startswith("done in ")


def test_touching_a_file_is_no_change(world):
    run(a_step(world), world)
    os.utime(world / "in.txt", (1, 1))
    assert run(a_step(world), world).startswith("unchanged")


def test_printed_object_is_kept_and_told(world):
    step = Step(
        "say",
        ("python", "-c", "print('hello'); print('{\"a\": 7}')"),
        (),
        (world / "said",),
        world / "said",
        lambda d: f"a is {d['a']}",
    )
    assert run(step, world).startswith("a is 7; done in ")
    assert run(step, world).startswith("a is 7; unchanged")
    assert step.printed == {"a": 7}
    wrong = Step("wrong", ("python", "-c", "print('hello')"), (), (world / "w",), world / "w", lambda d: "")
    with pytest.raises(StepFailedError, match="expected it to print one JSON object"):
        run(wrong, world)


def test_failure_is_told_and_leaves_nothing_that_is_reused(world):
    command = ("python", "-c", f"open({str(world / 'out.txt')!r}, 'w').write('half'); raise SystemExit(3)")
    broken = Step("work", command, (world / "in.txt",), (world / "out.txt",))
    for _ in range(2):
        with pytest.raises(StepFailedError, match="exit code 3"):
            run(broken, world)
    assert run(a_step(world), world).startswith("done in ")
    assert (world / "out.txt").read_text() == "TEXT"


def test_command_that_writes_nothing_is_a_failure(world):
    with pytest.raises(StepFailedError, match="without writing .*out.txt"):
        run(Step("idle", ("python", "-c", ""), (), (world / "out.txt",)), world)


# Fails on its first run after it has made its folder; notes its arguments.
TRAINING = (
    "import sys, os; o, log = sys.argv[1:3]; os.makedirs(o, exist_ok=True); open(log, 'a').write(' '.join(sys.argv[3:]) + ';')\n"
    "open(o + '/half', 'x') if not os.path.exists(o + '/half') else open(o + '/model', 'w')\n"
    "sys.exit(0 if os.path.exists(o + '/model') else 1)"
)


def test_unfinished_training_is_resumed_only_if_nothing_has_changed(world):
    def training(*more):
        command = ("python", "-c", TRAINING, str(world / "model"), str(world / "log"), *more)
        return Step("train", command, (world / "in.txt",), (world / "model",), resumable=True)

    with pytest.raises(StepFailedError):
        run(training(), world)
    assert run(training(), world).startswith("done in ")
    assert (world / "log").read_text() == ";--resume;"
    # Another setting: what an interrupted run left must not be resumed, nor a finished one be kept.
    with pytest.raises(StepFailedError):
        run(training("--lr=1"), world)
    with pytest.raises(StepFailedError):
        run(training("--lr=2"), world)
    assert (world / "log").read_text() == ";--resume;--lr=1;--lr=2;"
    (world / "in.txt").write_text("other data")
    with pytest.raises(StepFailedError):
        run(training("--lr=2"), world)
    assert (world / "log").read_text() == ";--resume;--lr=1;--lr=2;--lr=2;"


def test_content_hash_sees_names_contents_and_missing_files_but_no_scratch(tmp_path):
    folder = tmp_path / "model"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "a").write_text("12")
    first = content_hash([folder])
    (folder / "checkpoints" / "latest.pt").write_text("large")
    assert content_hash([folder]) == first
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    second = content_hash([folder])
    (folder / "a").rename(folder / "c")
    assert len({first, second, content_hash([folder])}) == 3
    assert content_hash([folder, tmp_path / "none"]) is None


def test_durations():
    assert [duration(s) for s in (0.04, 9.94, 59.4, 59.6, 125)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min 00 s",
        "2 min 05 s",
    ]


# A command that takes its time, counts the interrupts it gets, and saves when it is told to stop.
SLOW = (
    "import signal, sys, time\nn = []\nsignal.signal(signal.SIGINT, lambda *_: n.append(1))\nopen(sys.argv[1] + '.ready', 'w')\n"
    "end = time.monotonic() + 60\nwhile not n and time.monotonic() < end: time.sleep(0.01)\n"
    "time.sleep(0.5)\nopen(sys.argv[1], 'w').write(str(len(n)))\nsys.exit(130)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_us_interrupts_the_command_once_and_waits_for_it(tmp_path, number):
    saved = tmp_path / "saved"
    parent = (
        "import sys; from scripts.demo.steps import run_command\n"
        f"try: run_command(['python', '-c', {SLOW!r}, {str(saved)!r}], capture=False)\n"
        "except KeyboardInterrupt: print('interrupted'); sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "saved.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "interrupted\n")
    assert saved.read_text() == "1"


def test_records_survive_and_are_readable(tmp_path):
    records = Records(tmp_path / "steps")
    records.write("a", {"seconds": 2.5})
    assert Records(tmp_path / "steps").seconds("a") == 2.5
    assert json.loads((tmp_path / "steps" / "a.json").read_text()) == {"seconds": 2.5}
    assert records.seconds("never run") == 0.0
