"""The manifests of k8s/ as a cluster would read them, as far as that can be checked without one.

Not checked by anything here: admission, the operator, CEL rules, scheduling. k8s/README.md says so too.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.start import PROGRAM, settings
from tests.support.kustomize import load_all, render

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
SCHEMA = load_all(Path(__file__).with_name("rayservice.schema.yaml"))[0]
CRD = os.environ.get("CHORUS_RAYSERVICE_CRD")

overlays = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


def rayservice(overlay: Path) -> dict[str, Any]:
    (found,) = [item for item in render(overlay) if item["kind"] == "RayService"]
    return found


def serve_config(overlay: Path) -> dict[str, Any]:
    return yaml.safe_load(rayservice(overlay)["spec"]["serveConfigV2"])


def pods(overlay: Path) -> Iterator[dict[str, Any]]:
    cluster = rayservice(overlay)["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def errors(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def test_there_is_an_overlay_for_the_cpu_demo_and_one_for_gpus() -> None:
    assert {path.name for path in OVERLAYS} >= {"cpu-demo", "gpu"}


@overlays
def test_a_manifest_has_only_fields_that_exist(overlay: Path) -> None:
    assert errors(rayservice(overlay), SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "exludeHeadPodFromServeSvc"),
        (("rayClusterConfig", "workerGroupSpecs", 0), "maxReplica"),
        (("rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits"), "memroy"),
    ],
)
def test_a_typo_is_caught_at_any_depth(path: tuple[str | int, ...], key: str) -> None:
    manifest = copy.deepcopy(rayservice(OVERLAYS[0]))
    place = manifest["spec"]
    for part in path:
        place = place[part]
    place[key] = "1"
    assert any(key in error for error in errors(manifest, SCHEMA))


@overlays
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl; the tests' own renderer is used alone")
def test_kubectl_renders_the_same_objects(overlay: Path) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True, timeout=60
    )
    by_kind = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert by_kind == {item["kind"]: item for item in render(overlay)}


# ---- the Serve config


@overlays
def test_the_embedded_serve_config_is_one_that_ray_serve_takes(overlay: Path) -> None:
    ServeDeploySchema.model_validate(serve_config(overlay))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{'applications[0].args.model': 'demo/base', ...}; an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in leaves(value[key], f"{path}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and value:
        return {k: v for index, item in enumerate(value) for k, v in leaves(item, f"{path}[{index}]").items()}
    return {path: value}


@overlays
def test_the_embedded_serve_config_equals_serve_config_yaml_but_for_what_is_named(overlay: Path) -> None:
    """serve-config.differences.yaml maps each path that differs to the reason; no other may, and each must."""
    here, there = leaves(serve_config(overlay)), leaves(load_all(ROOT / "serve_config.yaml")[0])
    missing = object()
    differing = {path for path in here | there if here.get(path, missing) != there.get(path, missing)}
    assert differing == set(load_all(overlay / "serve-config.differences.yaml")[0])


@overlays
def test_the_arguments_are_ones_that_the_application_takes(overlay: Path) -> None:
    """Every name and type; not the model's folder, which lies in the image or on a volume."""
    from deployments.settings.app import AppArgs

    args = dict(serve_config(overlay)["applications"][0]["args"], model=str(ROOT / "demo"))
    AppArgs.model_validate(json.loads(json.dumps(args)))


@overlays
def test_pods_ask_for_keys_and_find_them_in_the_secret(overlay: Path) -> None:
    """They listen where others reach them. The head builds the application, a router on a worker reads the keys."""
    from deployments.http.auth import check_closed

    config = serve_config(overlay)
    args = config["applications"][0]["args"]
    check_closed(args.get("api_keys_env"), config["http_options"]["host"], is_open=args.get("open", False))
    assert args["api_keys_env"] == "CHORUS_API_KEYS"
    for pod in pods(overlay):
        (container,) = pod["containers"]
        assert {"chorus-secrets"} == {source["secretRef"]["name"] for source in container["envFrom"]}
    assert "--from-literal=CHORUS_API_KEYS=" in (ROOT / "k8s" / "README.md").read_text()


@overlays
def test_a_replica_fits_into_a_worker(overlay: Path) -> None:
    args = serve_config(overlay)["applications"][0]["args"]
    group = rayservice(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert args.get("replica_num_gpus", 0) <= int(limits.get("nvidia.com/gpu", "0"))
    assert args.get("replica_num_cpus", 1) + args.get("router_num_cpus", 0.25) <= float(limits["cpu"])
    assert args.get("num_replicas", 1) <= group["maxReplicas"]


# ---- the pods


@overlays
def test_every_container_starts_in_the_environment_that_a_server_wants(overlay: Path) -> None:
    for pod in pods(overlay):
        for container in pod["containers"]:
            given = {entry["name"]: entry.get("value") for entry in container["env"]}
            wanted = settings()
            assert {name: given.get(name) for name in wanted} == wanted


@overlays
def test_a_replaced_haproxy_outlives_the_longest_drain(overlay: Path) -> None:
    drain_s = serve_config(overlay)["applications"][0]["args"]["drain_s"]
    assert int(settings()["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > drain_s


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_an_image_names_the_program_that_closes_haproxy(name: str) -> None:
    assert f"/bin/{PROGRAM}" in (ROOT / "k8s" / "docker" / name).read_text()


@overlays
def test_no_replica_lands_on_the_head(overlay: Path) -> None:
    assert rayservice(overlay)["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@overlays
def test_what_a_container_mounts_is_a_volume_of_its_pod(overlay: Path) -> None:
    claims = {item["metadata"]["name"] for item in render(overlay) if item["kind"] == "PersistentVolumeClaim"}
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes)
        wanted = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert wanted <= claims


@overlays
def test_a_worker_that_stops_lets_streams_end_for_as_long_as_the_application_does(overlay: Path) -> None:
    from deployments.settings.app import AppArgs

    drain_s = serve_config(overlay)["applications"][0]["args"].get("drain_s", AppArgs.model_fields["drain_s"].default)
    _, *workers = pods(overlay)
    for pod in workers:
        (pause,) = (c["lifecycle"]["preStop"]["exec"]["command"][1] for c in pod["containers"])
        assert drain_s <= int(pause) < pod["terminationGracePeriodSeconds"]
    assert rayservice(overlay)["spec"]["rayClusterDeletionDelaySeconds"] > drain_s


@overlays
def test_the_object_store_fits_into_shared_memory_and_holds_the_adapters(overlay: Path) -> None:
    gib = 1 << 30
    """On every node: the store's actor, which holds the images, may live on any of them."""
    cluster = rayservice(overlay)["spec"]["rayClusterConfig"]
    host_bytes = serve_config(overlay)["applications"][0]["args"]["adapters"]["host_bytes"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (dshm,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == "dshm")
        store_bytes = int(group["rayStartParams"]["object-store-memory"])
        assert host_bytes < store_bytes < int(dshm["emptyDir"]["sizeLimit"].removesuffix("Gi")) * gib
        (container,) = group["template"]["spec"]["containers"]
        assert store_bytes < int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * gib


@overlays
def test_the_disk_tier_is_on_a_volume_that_holds_it(overlay: Path) -> None:
    """On every node, as above. A volume that is exactly full would have the pod evicted: the index needs room too."""
    from deployments.settings.app import AdapterSettings

    adapters = serve_config(overlay)["applications"][0]["args"]["adapters"]
    disk_bytes = adapters.get("disk_bytes", AdapterSettings.model_fields["disk_bytes"].default)
    for pod in pods(overlay):
        (mount,) = (m for c in pod["containers"] for m in c["volumeMounts"] if m["mountPath"] == adapters["disk_path"])
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
        assert disk_bytes < 0.95 * int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * (1 << 30)
        assert not mount.get("readOnly")


def test_the_ray_of_the_manifests_is_the_ray_of_the_project() -> None:
    requirement = (ROOT / "pyproject.toml").read_text().split('"ray[serve]>=', 1)[1].split(",", 1)[0]
    for overlay in OVERLAYS:
        assert rayservice(overlay)["spec"]["rayClusterConfig"]["rayVersion"].startswith(requirement)


# ---- the whole CRD, where one is at hand


def closed(schema: Any) -> Any:
    """The CRD's schema with unknown fields refused, and Kubernetes' own notations as JSON schema says them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if result.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    open_ended = "additionalProperties" in result or "x-kubernetes-preserve-unknown-fields" in result
    if isinstance(result.get("properties"), dict) and not open_ended:
        result["additionalProperties"] = False
    return result


@pytest.mark.skipif(CRD is None, reason="CHORUS_RAYSERVICE_CRD names no file with KubeRay's CRD")
@overlays
def test_the_whole_crd_takes_the_manifest(overlay: Path) -> None:
    versions = yaml.load(Path(str(CRD)).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = [closed(v["schema"]["openAPIV3Schema"]) for v in versions if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}
    assert errors(rayservice(overlay), schema) == []
    wrong = copy.deepcopy(rayservice(overlay))
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    assert errors(wrong, schema)
