"""What the doctor sees, and that it harms nothing by looking."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import doctor
from launcher.doctor import Finding


def findings(name: str) -> list[Finding]:
    return [finding for finding in doctor.examine() if finding.name == name]


def only(name: str) -> Finding:
    (finding,) = findings(name)
    return finding


def test_where_tests_run_nothing_is_broken() -> None:
    assert [finding for finding in doctor.examine() if finding.health == "broken"] == []


def test_what_is_wrong_comes_with_a_remedy() -> None:
    assert [finding for finding in doctor.examine() if finding.health in ("warning", "broken") and not finding.remedy] == []


def test_a_missing_package_is_broken_and_another_version_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "constraints.txt").write_text("# pinned\nRay==1.0 ; python_version > '3'\nruamel_yaml==99\ntorch==2.0\n")
    monkeypatch.setattr("launcher.__file__", str(tmp_path / "launcher" / "__init__.py"))
    monkeypatch.setattr(doctor, "read_version", {"ray": "1.1", "torch": "2.0+cpu"}.get)
    assert (only("ray").health, only("ray").remedy) == ("warning", "pip install 'ray==1.0'")
    assert only("torch").health == "ok"
    assert only("ruamel.yaml").health == "broken" and "ruamel.yaml==99" in only("ruamel.yaml").remedy


def test_a_gpu_is_named_and_a_cpu_build_of_torch_beside_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", lambda: [("NVIDIA T4", 16 << 30, 7.5)])
    monkeypatch.setattr(doctor, "read_version", lambda name: "2.13.0+cpu")
    assert only("GPU 0").found == "NVIDIA T4, 16.0 GiB, compute capability 7.5"
    assert only("torch build").health == "warning"
    works = {ability.what: ability.works for ability in doctor.list_abilities()}
    assert works["model.dtype fp16"] and not works["model.dtype bf16"]


@pytest.mark.parametrize(("native", "dtype", "why"), [(True, "bf16", "native"), (False, "fp32", "slower")])
def test_the_dtype_of_a_cpu_is_the_one_that_a_run_takes(native: bool, dtype: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", list)
    monkeypatch.setattr(doctor, "cpu_has_bf16", lambda: native)
    assert only("GPU").found.endswith(f"in {dtype}")
    assert [why in ability.why for ability in doctor.list_abilities() if ability.what == "model.dtype bf16"] == [True]


def test_without_a_gpu_qlora_works_and_fp16_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", list)
    works = {ability.what: ability.works for ability in doctor.list_abilities()}
    assert works["QLoRA in 4 and 8 bits"] and not works["model.dtype fp16"] and not works["flash attention"]


@pytest.mark.parametrize(("address", "health"), [("127.0.1.1", "note"), ("10.0.0.5", "ok")])
def test_a_host_name_on_loopback_is_noted(address: str, health: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    assert only("host name").health == health


def test_a_host_name_that_does_not_resolve_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert "does not resolve" in only("host name").found


def test_loopback_is_an_interface() -> None:
    assert doctor.find_interfaces()["lo"] == "127.0.0.1"


def test_a_temporary_folder_too_deep_for_rays_sockets_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/" + "x" * 60)
    assert only("temporary files").health == "broken"


def test_an_old_lock_is_stale_and_a_new_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert findings("stale lock") == []
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert only("stale lock").remedy == f"rm {lock}"
    assert lock.exists()


def full_disk(place: str) -> Callable[[object], object]:
    import shutil

    real = shutil.disk_usage
    return lambda path: real(path)._replace(free=1 << 20) if str(path).startswith(place) else real(path)  # type: ignore[arg-type]


def test_a_full_disk_and_a_small_shm_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", full_disk("/"))
    assert only("cache").health == "warning" and "1.0 MiB" in only("cache").found
    assert "--shm-size" in only("shared memory").remedy


def test_offline_variables_are_told_and_a_token_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in repr(doctor.examine())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in only("hub").found
