"""What is in cluster/, checked as far as it can be without the clouds it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from launcher.cluster import load_cluster, locate_cluster
from launcher.errors import ClusterError, RecipeError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
RAY_UP = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
SCRIPTS = ("slurm.sh", "bare-hosts.sh")
NOT_CLUSTER_FILES = {*RAY_UP, *KUBERAY}


def load_yaml(name: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load((FOLDER / name).read_text())
    return content


def test_the_readme_lists_every_file() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert {path.name for path in FOLDER.iterdir() if f"`{path.name}`" not in readme} == {"README.md"}


@pytest.mark.parametrize(
    "path", [path for path in sorted(FOLDER.glob("*.yaml")) if path.name not in NOT_CLUSTER_FILES], ids=lambda p: p.name
)
def test_cluster_files_are_clusters(path: Path) -> None:
    assert load_cluster(path).device_memory > 1 << 30
    assert locate_cluster(path.stem) is not None


def test_sizes_have_a_unit_or_are_bytes(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("device_memory: 80GiB\nhost_memory: 200000000000\n")
    cluster = load_cluster(tmp_path / "c.yaml")
    assert (cluster.device_memory, cluster.host_memory) == (80 << 30, 200_000_000_000)
    (tmp_path / "c.yaml").write_text("device_memory: 80 gigs\n")
    with pytest.raises(RecipeError, match="should be a size with its unit, such as 80GiB, or a number of bytes"):
        load_cluster(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", sorted(NOT_CLUSTER_FILES))
def test_ray_up_and_kuberay_files_are_not_offered_as_clusters(name: str) -> None:
    with pytest.raises(ClusterError) as raised:
        locate_cluster("no-such-cluster")
    assert name.removesuffix(".yaml") not in raised.value.remedy and "local" in raised.value.remedy


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_meet_rays_schema_and_defaults(name: str) -> None:
    import ray
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = load_yaml(name)
    jsonschema.validate(config, json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text()))
    # What `ray up` itself does before it talks to a cloud: defaults of the provider, then node types, heads and limits.
    validate_config(fillout_defaults(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_open_nothing_but_ssh(name: str) -> None:
    start = " ".join(load_yaml(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start


def templates(name: str) -> list[dict[str, Any]]:
    spec = load_yaml(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_meet_kubernetes_schema(name: str) -> None:
    import kubernetes_validate

    for template in templates(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_hang_together(name: str) -> None:
    """Structure only: the schema of KubeRay's own resources is in no package that could be installed."""
    import ray

    resource = load_yaml(name)
    assert resource["apiVersion"] == "ray.io/v1" and resource["kind"] in ("RayCluster", "RayJob")
    spec = resource["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if resource["kind"] == "RayJob":
        assert f"--nodes {cluster['workerGroupSpecs'][0]['replicas']} " in spec["entrypoint"]
    for template in templates(name):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "shared" in volumes


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_clean(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_options_are_rays() -> None:
    """symmetric-run refuses options it gives itself, and ray start those it does not know."""
    from ray.scripts.scripts import start

    text = (FOLDER / "slurm.sh").read_text()
    command = text[text.index("ray symmetric-run") :].split(" -- ")[0]
    known = {option for parameter in start.params for option in parameter.opts} | {"--address", "--min-nodes"}
    used = {word.split("=")[0].strip("\\") for word in command.split() if word.startswith("--")}
    assert used <= known - {"--head", "--node-ip-address", "--port", "--block"}
