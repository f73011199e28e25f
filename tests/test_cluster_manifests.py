"""The manifests of cluster/: KubeRay's against a schema of the fields used, the launcher's by Ray's own check."""

import copy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from cluster_commands import CLUSTER, ROOT, told
from kubernetes_schema import KINDS

MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))
CLOUDS = [path for path in LAUNCHERS if path.stem != "workstations"]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}


@cache
def documents(path: Path) -> list[dict]:
    """What a file holds, not to be changed."""
    return list(yaml.safe_load_all(path.read_text()))


def resources(kind: str) -> list[dict]:
    """What the manifests of KubeRay hold of one kind."""
    return [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]


def violations(document: dict) -> list[str]:
    """What is wrong with a resource by the schema of its kind."""
    return [error.message for error in jsonschema.Draft202012Validator(KINDS[document["kind"]]).iter_errors(document)]


def specs() -> list[dict]:
    """The clusters that are described: one that stays, one of a job."""
    (cluster,), (job,) = resources("RayCluster"), resources("RayJob")
    return [cluster["spec"], job["spec"]["rayClusterSpec"]]


def groups(spec: dict) -> list[dict]:
    """The head and the worker groups of a cluster."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> Iterator[dict]:
    """Templates of all pods."""
    for spec in specs():
        yield from (group["template"] for group in groups(spec))
    yield resources("RayJob")[0]["spec"]["submitterPodTemplate"]


def volumes(template: dict) -> dict[str, dict]:
    return {volume["name"]: volume for volume in template["spec"]["volumes"]}


def size(quantity: str) -> int:
    """Bytes of a quantity of memory."""
    number = quantity.rstrip("KMGTi")
    return int(number) * UNITS[quantity[len(number) :]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_uses_known_fields(path):
    assert documents(path)
    assert [violation for document in documents(path) for violation in violations(document)] == []


@pytest.mark.parametrize(
    ("kind", "place", "key", "wrong"),
    [
        ("RayCluster", "spec", "enableInTreeAutoScaling", True),
        ("RayCluster", "spec", "rayVersion", 2.60),
        ("RayCluster", "spec.authOptions", "mode", "Token"),
        ("RayCluster", "spec.headGroupSpec", "serviceType", "Clusterip"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams", "num-cpus", 0),
        ("RayCluster", "spec.headGroupSpec.template.spec.securityContext", "runAsNonroot", True),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.0", "image", "vop"),
        ("RayCluster", "spec.workerGroupSpecs.0", "minReplica", 1),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits", "nvidia.com/gpus", "1"),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits", "memory", "32GB"),
        ("RayCluster", "spec.workerGroupSpecs.2.template.spec.tolerations.0", "effect", "NoScheduling"),
        ("RayCluster", "spec.workerGroupSpecs.1.template.spec.volumes.0", "emptyDir", {}),
        ("RayJob", "spec", "submissionMode", "K8SJobMode"),
        ("RayJob", "spec", "ttlSecondsAfterFinish", 600),
        ("RayJob", "", "apiVersion", "ray.io/v1alpha1"),
        ("NetworkPolicy", "spec.ingress.1.ports.0", "port", "8265"),
        ("NetworkPolicy", "metadata", "namespace", "default"),
        ("PersistentVolumeClaim", "spec", "accessModes", ["ReadWriteAll"]),
    ],
)
def test_a_slip_in_a_manifest_is_found(kind, place, key, wrong):
    document = copy.deepcopy(resources(kind)[0])
    owner = document
    for step in filter(None, place.split(".")):
        owner = owner[int(step) if step.isdigit() else step]
    owner[key] = wrong
    assert violations(document)


def test_the_cluster_of_a_job_is_the_one_that_stays():
    stays, comes = specs()
    assert stays == comes


def test_a_cluster_fits_the_images_and_the_versions():
    locked = (CLUSTER / "requirements-gpu.lock").read_text()
    for spec in specs():
        assert f"\nray=={spec['rayVersion']} " in locked
    images = {container["image"] for pod in pods() for container in pod["spec"]["containers"]}
    assert {image.rpartition(":")[2] for image in images} == {"cpu", "gpu"}


def test_a_job_tells_vop_what_it_understands():
    told(shlex.split(resources("RayJob")[0]["spec"]["entrypoint"])[1:])


def test_no_pod_may_more_than_it_must():
    for pod in pods():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] == 1000  # that of the images
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        own = [container["securityContext"] for container in pod["spec"]["containers"]]
        for restricted in [*own, *(spec["autoscalerOptions"]["securityContext"] for spec in specs())]:
            assert restricted == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
            }  # fmt: skip
    accounts = {account["metadata"]["name"]: account for account in resources("ServiceAccount")}
    for spec in specs():
        for group in groups(spec):
            account = accounts[group["template"]["spec"]["serviceAccountName"]]
            assert account.get("automountServiceAccountToken", True) == (group is spec["headGroupSpec"])


def test_only_who_must_reaches_a_cluster():
    (policy,) = resources("NetworkPolicy")
    label = policy["spec"]["podSelector"]["matchLabels"]
    assert all(label.items() <= pod["metadata"]["labels"].items() for pod in pods())
    own, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert all("namespaceSelector" in peer for rule in others for peer in rule["from"])
    assert [port["port"] for rule in others for port in rule["ports"]] == [8265, 8080]
    for spec in specs():
        assert spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert {"gcs-server", "dashboard", "metrics"} == {
            port["name"] for port in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
        }


def test_memory_is_promised_once():
    for pod in pods():
        for container in pod["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for spec in specs():
        assert spec["headGroupSpec"]["rayStartParams"].items() >= {("num-cpus", "0"), ("memory", "0")}
        for group in groups(spec):
            started, (container,) = group["rayStartParams"], group["template"]["spec"]["containers"]
            shared = size(volumes(group["template"])["shm"]["emptyDir"]["sizeLimit"])
            objects, actors = int(started["object-store-memory"]), int(started["memory"])
            assert objects <= shared
            assert objects + actors <= 0.9 * size(container["resources"]["limits"]["memory"])


def test_every_pod_has_the_folders_it_writes_to():
    (claim,) = resources("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        for container in pod["spec"]["containers"]:
            mounted = {mount["mountPath"]: volumes(pod)[mount["name"]] for mount in container["volumeMounts"]}
            assert "emptyDir" in mounted["/tmp"]
            if container["name"] != "ray-job-submitter":
                assert mounted["/data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_groups_of_cards_of_cores_and_of_machines_that_may_go():
    for spec in specs():
        gpu, cpu, spot = spec["workerGroupSpecs"]
        assert spec["enableInTreeAutoscaling"]
        assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert gpu["template"]["spec"]["tolerations"]
        assert cpu["minReplicas"] > 0  # a search is placed on what is there
        assert spot["minReplicas"] == 0
        assert spot["template"]["spec"]["nodeSelector"].keys() == {spot["template"]["spec"]["tolerations"][0]["key"]}
        for group in (gpu, cpu, spot):
            assert group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def test_rays_autoscaler_reads_what_is_meant():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    types = _derive_autoscaling_config_from_ray_cr(resources("RayCluster")[0])["available_node_types"]
    assert {name: found["resources"] for name, found in types.items()} == {
        "headgroup": {"CPU": 0, "memory": 0},
        "gpu": {"CPU": 8, "GPU": 1, "memory": 12_000_000_000},
        "cpu": {"CPU": 16, "memory": 40_000_000_000},
        "spot": {"CPU": 16, "memory": 40_000_000_000},
    }
    assert {name: found["min_workers"] for name, found in types.items() if found["min_workers"]} == {"cpu": 2}
    assert types["spot"]["priority"] > types["cpu"].get("priority", 0)


def checked(config: dict) -> dict:
    """A launcher's file as Ray completes it. Raises what Ray raises if it is not valid."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    completed = prepare_config(copy.deepcopy(config))
    validate_config(completed)
    return completed


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_file_passes_rays_own_check(path):
    (config,) = documents(path)
    completed = checked(config)
    assert completed["max_workers"] == config["max_workers"]
    for slip in ({"max_worker": 1}, {"idle_timeout_minutes": "5"}, {"docker": {**config["docker"], "images": "vop"}},
                 {"auth": {"user": "ubuntu"}}, {"head_start_ray_commands": "ray start"}):  # fmt: skip
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            checked(config | slip)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launched_cluster_wants_its_token_and_shows_its_dashboard_to_itself_only(path):
    (config,) = documents(path)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    start = next(line for line in config["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)
    assert {"--cap-drop ALL", "--security-opt no-new-privileges"} <= set(config["docker"]["run_options"])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_ray_start_knows_every_option(path):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    (config,) = documents(path)
    lines = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    lines += (CLUSTER / "slurm/nodes.sbatch").read_text().replace("\\\n", " ").splitlines()
    used = {
        option.partition("=")[0].rstrip()
        for line in lines if "ray start " in line and not line.startswith("#")
        for option in line.partition("ray start ")[2].split() if option.startswith("--")
    }  # fmt: skip
    used |= {f"--{name}" for spec in specs() for group in groups(spec) for name in group["rayStartParams"]}
    assert len(used) >= 8
    assert used <= known


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_machines_of_a_cloud_are_known_by_their_role_and_not_from_outside(path):
    (config,) = documents(path)
    assert config["provider"]["use_internal_ips"]
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "memory": 0}
    assert types["cpu"]["min_workers"] > 0
    machines = {name: kind["node_config"] for name, kind in types.items()}
    if config["provider"]["type"] == "aws":
        roles = {name: machine["IamInstanceProfile"]["Arn"] for name, machine in machines.items()}
        assert machines["spot"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        for machine in machines.values():
            assert machine["SecurityGroupIds"]  # one that Ray makes lets ssh in from everywhere
            assert machine["MetadataOptions"]["HttpTokens"] == "required"
    else:
        roles = {name: machine["serviceAccounts"][0]["email"] for name, machine in machines.items()}
        assert machines["spot"]["scheduling"]["provisioningModel"] == "SPOT"
        assert all("accessConfigs" not in interface for m in machines.values() for interface in m["networkInterfaces"])
    head = roles.pop("head")
    assert head not in roles.values()  # workers may not start machines
    assert len(set(roles.values())) == 1


def test_the_images_of_the_launcher_are_built_here():
    for path in LAUNCHERS:
        kind = documents(path)[0]["docker"]["image"].rpartition(":")[2]
        assert (ROOT / "cluster" / {"gpu": "Dockerfile", "cpu": "Dockerfile.cpu"}[kind]).exists()
