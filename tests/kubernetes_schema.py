"""The fields of Kubernetes and KubeRay that the manifests of cluster/ use, as a JSON schema in which any other fails.

Written from the API reference of Kubernetes 1.31 and the resource definitions of KubeRay 1.7.
"""

TEXT, FLAG, COUNT = {"type": "string", "minLength": 1}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def exactly(required: str = "", **fields: dict) -> dict:
    """An object of these fields and no other."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def one_of(*values: object) -> dict:
    """One of these values."""
    return {"enum": list(values)}


def many(items: dict) -> dict:
    """A list of at least one."""
    return {"type": "array", "items": items, "minItems": 1}


RESOURCES = exactly("requests limits", **dict.fromkeys(("requests", "limits"), TEXTS | {
    "additionalProperties": QUANTITY, "propertyNames": one_of("cpu", "memory", "nvidia.com/gpu", "ephemeral-storage")
}))  # fmt: skip
RESTRICTED = exactly(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation=FLAG, readOnlyRootFilesystem=FLAG, capabilities=exactly("drop", drop=many(TEXT)),
)  # fmt: skip
MOUNTS = many(exactly("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG))
CONTAINER = exactly(
    "name image securityContext resources",
    name=NAME,
    image={"type": "string", "pattern": r"^[^ :]+:[^ :]+$"},
    securityContext=RESTRICTED,
    ports=many(exactly("name containerPort", name={"type": "string", "maxLength": 15}, containerPort=COUNT)),
    resources=RESOURCES,
    volumeMounts=MOUNTS,
)
VOLUME = exactly(
    "name",
    name=NAME,
    persistentVolumeClaim=exactly("claimName", claimName=NAME),
    emptyDir=exactly(medium=one_of("Memory"), sizeLimit=QUANTITY),
) | {"minProperties": 2, "maxProperties": 2}
TOLERATION = exactly("key operator", key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT,
                     effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"))  # fmt: skip
TEMPLATE = exactly(
    "metadata spec",
    metadata=exactly("labels", labels=TEXTS, annotations=TEXTS),
    spec=exactly(
        "securityContext containers",
        serviceAccountName=NAME,
        automountServiceAccountToken=FLAG,
        restartPolicy=one_of("Never", "OnFailure"),
        securityContext=exactly(
            "runAsNonRoot seccompProfile",
            runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT,
            fsGroupChangePolicy=one_of("OnRootMismatch", "Always"),
            seccompProfile=exactly("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
        ),
        nodeSelector=TEXTS, tolerations=many(TOLERATION), containers=many(CONTAINER), volumes=many(VOLUME),
    ),
)  # fmt: skip
CLUSTER = exactly(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=exactly("mode", mode=one_of("token", "disabled"), secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=exactly(
        version=one_of("v1", "v2"), idleTimeoutSeconds=COUNT, upscalingMode=one_of("Default", "Conservative"),
        securityContext=RESTRICTED, resources=RESOURCES, volumeMounts=MOUNTS,
    ),
    headGroupSpec=exactly(
        "rayStartParams template",
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), rayStartParams=TEXTS, template=TEMPLATE,
    ),
    workerGroupSpecs=many(exactly(
        "groupName minReplicas maxReplicas rayStartParams template",
        groupName=NAME, priority=COUNT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT,
        idleTimeoutSeconds=COUNT, rayStartParams=TEXTS, template=TEMPLATE,
    )),
)  # fmt: skip
JOB = exactly(
    "entrypoint submissionMode rayClusterSpec",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    submitterConfig=exactly(backoffLimit=COUNT),
    preRunningDeadlineSeconds=COUNT, activeDeadlineSeconds=COUNT, ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=FLAG,
    submitterPodTemplate=TEMPLATE,
    rayClusterSpec=CLUSTER,
)  # fmt: skip
LABELLED = exactly("matchLabels", matchLabels=TEXTS)
POLICY = exactly(
    "podSelector policyTypes ingress",
    podSelector=LABELLED,
    policyTypes=many(one_of("Ingress", "Egress")),
    ingress=many(exactly(
        "from",
        **{"from": many(exactly(namespaceSelector=LABELLED, podSelector=LABELLED) | {"minProperties": 1})},
        ports=many(exactly("protocol port", protocol=one_of("TCP", "UDP"), port=COUNT)),
    )),
)  # fmt: skip
CLAIM = exactly(
    "accessModes resources",
    accessModes=many(one_of("ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany")),
    storageClassName=NAME,
    resources=exactly("requests", requests=exactly("storage", storage=QUANTITY)),
)


def kind(version: str, required: str = "", **fields: dict) -> dict:
    """A resource of the namespace, or the namespace itself."""
    metadata = exactly("name", name=NAME, namespace=one_of("vop"), labels=TEXTS, annotations=TEXTS)
    return exactly(f"apiVersion kind metadata {required}", apiVersion=one_of(version), kind=TEXT, metadata=metadata,
                   **fields)  # fmt: skip


KINDS = {
    "Namespace": kind("v1"),
    "PersistentVolumeClaim": kind("v1", "spec", spec=CLAIM),
    "ServiceAccount": kind("v1", automountServiceAccountToken=FLAG),
    "NetworkPolicy": kind("networking.k8s.io/v1", "spec", spec=POLICY),
    "RayCluster": kind("ray.io/v1", "spec", spec=CLUSTER),
    "RayJob": kind("ray.io/v1", "spec", spec=JOB),
}
