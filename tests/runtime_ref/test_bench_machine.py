"""What the bench says about a machine, read from made-up trees; and the energy it reports."""

import json
import time

import pytest

from runtime_ref.bench.energy import EnergyRun, Meter, find_meters, integral, used
from runtime_ref.bench.machine import conditions, describe, hardware
from tests.runtime_ref.boards import laptop, raspberry_pi_5, write


def test_a_raspberry_pi(tmp_path):
    root = raspberry_pi_5(tmp_path)
    assert hardware(root) == {
        "board": "Raspberry Pi 5 Model B Rev 1.0",
        "cpu": "Cortex-A76",
        "cores": 4,
        "memory_bytes": 8245432 * 1024,
        "caches": {"L1d": "64K", "L2": "512K"},
        "governor": "ondemand",
        "max_mhz": 2400.0,
    }
    assert conditions(root) == {
        "mhz": 1500.0,
        "temperature_c": {"cpu-thermal": 61.7},
        "throttled": [
            "under-voltage now",
            "throttled now",
            "under-voltage since the start",
            "throttled since the start",
        ],
        "throttle_count": None,
    }


def test_the_board_is_known_without_a_device_tree(tmp_path):
    root = raspberry_pi_5(tmp_path, throttled="0x0")
    (root / "proc/device-tree/model").unlink()
    assert hardware(root)["board"] == "Raspberry Pi 5 Model B Rev 1.0"  # cpuinfo has it too
    assert conditions(root)["throttled"] == []


def test_a_laptop(tmp_path):
    root = laptop(tmp_path)
    told = hardware(root)
    assert told["board"] == "Latitude 5420"
    assert told["cpu"] == "Intel(R) Core(TM) i5-1145G7 @ 2.60GHz"
    assert told["cores"] == 6
    assert told["governor"] is told["max_mhz"] is None
    assert conditions(root)["throttle_count"] == 17
    assert conditions(root)["throttled"] is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"nonsense\n", b"\0"])
def test_strange_contents_are_left_out(tmp_path, content):
    root = raspberry_pi_5(tmp_path)
    names = [p for p in root.rglob("*") if p.is_file()]
    for path in names:
        path.write_bytes(content)
    told, now = hardware(root), conditions(root)
    assert told["cores"] is told["memory_bytes"] is told["max_mhz"] is None
    assert now == {"mhz": None, "temperature_c": {}, "throttled": None, "throttle_count": None}
    assert find_meters(root) == []


def test_nothing_is_invented_where_nothing_is_told(tmp_path):
    told = hardware(tmp_path)
    assert told.pop("cpu")  # Python knows the architecture
    assert set(map(str, told.values())) == {"None", "{}"}
    assert find_meters(tmp_path) == []


def test_versions_and_this_machine():
    import numba
    import numpy

    told = describe()
    json.dumps(told)
    assert told["numpy"] == numpy.__version__
    assert told["numba"] == numba.__version__
    assert told["cores"] >= 1


def test_only_whole_packages_and_power_sensors_count(tmp_path):
    assert [m.name for m in find_meters(laptop(tmp_path / "a"))] == ["RAPL package-0"]
    assert [m.name for m in find_meters(raspberry_pi_5(tmp_path / "b"))] == ["ina219 (hwmon2)"]


def test_a_counter_between_two_readings_and_over_its_end(tmp_path):
    root = laptop(tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    with EnergyRun(find_meters(root)) as run:
        counter.write_text("262143250000\n")
    assert run.joules() == {"RAPL package-0": pytest.approx(0.25)}
    with EnergyRun(find_meters(root)) as run:
        counter.write_text("1000000\n")  # 78850 to the end of the range, and 1000000 more
    assert run.joules() == {"RAPL package-0": pytest.approx(1.07885)}
    assert used(5, 5, 100) == 0


def test_power_is_integrated(tmp_path):
    meters = find_meters(raspberry_pi_5(tmp_path))
    start = time.perf_counter()
    with EnergyRun(meters) as run:
        time.sleep(0.12)
    elapsed = time.perf_counter() - start
    (joules,) = run.joules().values()
    assert 2.5 * 0.12 * 0.99 <= joules <= 2.5 * elapsed  # 2.5 W all the time
    assert integral([(0.0, 1_000_000), (2.0, 3_000_000), (3.0, 3_000_000)]) == pytest.approx(7.0)


def test_a_source_that_fails_is_left_out(tmp_path):
    root = write(tmp_path, {"energy": "12\n"})
    with EnergyRun([Meter("here", root / "energy", 100), Meter("gone", root / "none", 100)]) as run:
        pass
    assert run.joules() == {"here": 0.0}
