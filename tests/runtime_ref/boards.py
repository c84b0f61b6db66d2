"""Made-up /proc and /sys trees of machines that are not here: a Raspberry Pi 5 and a laptop whose processor has RAPL."""

from pathlib import Path

PI_CPUINFO = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

processor\t: 1
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Revision\t: d04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""

LAPTOP_CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i5-1145G7 @ 2.60GHz
cache size\t: 8192 KB

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i5-1145G7 @ 2.60GHz
"""


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def raspberry_pi_5(root: Path, throttled: str = "50005") -> Path:
    cpu = "sys/devices/system/cpu"
    return write(
        root,
        {
            "proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/cpuinfo": PI_CPUINFO,
            "proc/meminfo": "MemTotal:        8245432 kB\nMemFree:         7000000 kB\n",
            f"{cpu}/online": "0-3\n",
            f"{cpu}/cpu0/cpufreq/scaling_governor": "ondemand\n",
            f"{cpu}/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
            f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
            f"{cpu}/cpu0/cache/index0/level": "1\n",
            f"{cpu}/cpu0/cache/index0/type": "Data\n",
            f"{cpu}/cpu0/cache/index0/size": "64K\n",
            f"{cpu}/cpu0/cache/index1/level": "1\n",
            f"{cpu}/cpu0/cache/index1/type": "Instruction\n",
            f"{cpu}/cpu0/cache/index1/size": "64K\n",
            f"{cpu}/cpu0/cache/index2/level": "2\n",
            f"{cpu}/cpu0/cache/index2/type": "Unified\n",
            f"{cpu}/cpu0/cache/index2/size": "512K\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "61700\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": f"{throttled}\n",
            "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
            "sys/class/hwmon/hwmon2/name": "ina219\n",
            "sys/class/hwmon/hwmon2/power1_input": "2500000\n",
            "sys/class/hwmon/hwmon3/name": "amdgpu\n",
            "sys/class/hwmon/hwmon3/power1_input": "9000000\n",
        },
    )


def laptop(root: Path) -> Path:
    rapl = "sys/class/powercap"
    return write(
        root,
        {
            "proc/cpuinfo": LAPTOP_CPUINFO,
            "proc/meminfo": "MemTotal:       16245432 kB\n",
            "sys/class/dmi/id/product_name": "Latitude 5420\n",
            "sys/devices/system/cpu/online": "0-3,6-7\n",
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "17\n",
            f"{rapl}/intel-rapl:0/name": "package-0\n",
            f"{rapl}/intel-rapl:0/energy_uj": "262143000000\n",
            f"{rapl}/intel-rapl:0/max_energy_range_uj": "262143328850\n",
            f"{rapl}/intel-rapl:0:0/name": "core\n",
            f"{rapl}/intel-rapl:0:0/energy_uj": "1000\n",
            f"{rapl}/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
            f"{rapl}/intel-rapl:1/name": "psys\n",
            f"{rapl}/intel-rapl:1/energy_uj": "5\n",
            f"{rapl}/intel-rapl:1/max_energy_range_uj": "262143328850\n",
        },
    )
