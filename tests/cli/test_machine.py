"""What `doctor` reads about a container: cgroup v2, v1, and none."""

import pytest

from stageflow.cli.machine import CgroupLimits, cgroup_limits, survey


def tree(base, files):
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return base


@pytest.fixture
def membership(tmp_path):
    def write(*lines):
        file = tmp_path / "membership"
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path, membership):
    root = tree(
        tmp_path / "cg",
        {
            "cgroup.controllers": "cpu memory pids",
            "a/cpu.max": "150000 100000",
            "a/memory.max": "1000000",
            "a/b/cpu.max": "max 100000",
            "a/b/memory.max": "2000000",
            "a/b/memory.current": "5000",
            "a/b/pids.max": "max",
        },
    )
    assert cgroup_limits(root, membership("0::/a/b")) == CgroupLimits(2, 1.5, 1_000_000, 5000, None)


def test_version_2_in_a_container_whose_path_is_outside(tmp_path, membership):
    root = tree(
        tmp_path / "cg", {"cgroup.controllers": "", "cpu.max": "50000 100000", "memory.max": "max", "pids.max": "64"}
    )
    assert cgroup_limits(root, membership("0::/docker/1234")) == CgroupLimits(2, 0.5, None, None, 64)


def test_version_1_reads_each_controller(tmp_path, membership):
    root = tree(
        tmp_path / "cg",
        {
            "cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": "4096000",
            "memory/job/memory.usage_in_bytes": "77",
            "memory/memory.limit_in_bytes": str((1 << 63) - 4096),
        },
    )
    lines = ("4:cpu,cpuacct:/job", "3:memory:/job", "1:name=systemd:/x")
    assert cgroup_limits(root, membership(*lines)) == CgroupLimits(1, 2.0, 4_096_000, 77, None)


def test_without_cgroups_nothing_is_limited(tmp_path):
    assert cgroup_limits(tmp_path / "none", tmp_path / "gone") == CgroupLimits(None)


def test_the_survey_of_this_machine_is_plausible():
    found = survey()
    assert 1 <= found.usable_by_affinity <= found.cores
    assert 0 < found.memory_available <= found.memory
    assert found.shared_memory
