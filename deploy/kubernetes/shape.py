"""The fields that this launcher's manifests may have, and their types: what a strict API server would look at.

No cluster is asked. Only fields that ``render`` writes, or that people add by hand to a manifest of ours without
weakening it, are known; those that Pod Security's ``restricted`` forbids (``hostPath``, ``privileged``) are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from sft_job.config.fields import nearest
from sft_job.contract import ExitCode
from sft_job.errors import Problem

Shape = Any
"""A type (str, int, bool), a tuple of words, a list of one shape, a mapping of fields (``!`` = required), or a test."""


def _quantity(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, str) and isinstance(name, str) for name, each in cast("dict[Any, Any]", value).items()
    )


def _quantities(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_quantity, cast("dict[Any, Any]", value).values()))


_EXPECTED: Mapping[Any, str] = {
    str: "a text (in quotes where it looks like a number)",
    int: "a whole number",
    bool: "true or false",
    _quantity: "a quantity",
    _texts: "a mapping of names to texts (numbers in quotes)",
    _quantities: "a mapping of resources to quantities",
}

_METADATA: Shape = {"name!": str, "namespace": str, "labels": _texts, "annotations": _texts}
_ENV: Shape = {
    "name!": str,
    "value": str,
    "valueFrom": {
        "secretKeyRef": {"name!": str, "key!": str, "optional": bool},
        "configMapKeyRef": {"name!": str, "key!": str, "optional": bool},
        "fieldRef": {"fieldPath!": str, "apiVersion": str},
    },
}
_CONTAINER: Shape = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": [_ENV],
    "ports": [{"name": str, "containerPort!": int, "protocol": ("TCP", "UDP")}],
    "resources": {"requests": _quantities, "limits": _quantities},
    "securityContext": {
        "allowPrivilegeEscalation": bool,
        "readOnlyRootFilesystem": bool,
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "capabilities": {"drop": [str]},
        "seccompProfile": {"type!": ("RuntimeDefault", "Localhost"), "localhostProfile": str},
    },
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
}
_VOLUME: Shape = {
    "name!": str,
    "configMap": {"name!": str, "optional": bool, "defaultMode": int},
    "secret": {"secretName!": str, "optional": bool, "defaultMode": int},
    "emptyDir": {"medium": ("Memory", ""), "sizeLimit": _quantity},
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
}
_POD: Shape = {
    "activeDeadlineSeconds": int,
    "automountServiceAccountToken": bool,
    "containers!": [_CONTAINER],
    "enableServiceLinks": bool,
    "imagePullSecrets": [{"name!": str}],
    "nodeSelector": _texts,
    "priorityClassName": str,
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "runtimeClassName": str,
    "schedulerName": str,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "fsGroupChangePolicy": ("Always", "OnRootMismatch"),
        "supplementalGroups": [int],
        "seccompProfile": {"type!": ("RuntimeDefault", "Localhost"), "localhostProfile": str},
    },
    "serviceAccountName": str,
    "subdomain": str,
    "terminationGracePeriodSeconds": int,
    "tolerations": [
        {
            "key": str,
            "operator": ("Equal", "Exists"),
            "value": str,
            "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
            "tolerationSeconds": int,
        }
    ],
    "volumes": [_VOLUME],
}
_TEMPLATE: Shape = {"metadata": {"labels": _texts, "annotations": _texts}, "spec!": _POD}
_JOB: Shape = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "completions": int,
    "parallelism": int,
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": ("FailJob", "Ignore", "Count"),
                "onExitCodes": {"operator!": ("In", "NotIn"), "values!": [int], "containerName": str},
                "onPodConditions": [{"type!": str, "status": ("True", "False", "Unknown")}],
            }
        ]
    },
    "podReplacementPolicy": ("Failed", "TerminatingOrFailed"),
    "successPolicy": {"rules!": [{"succeededIndexes": str, "succeededCount": int}]},
    "suspend": bool,
    "template!": _TEMPLATE,
    "ttlSecondsAfterFinished": int,
}
_REPLICA: Shape = {
    "replicas!": int,
    "restartPolicy!": ("ExitCode", "Always", "OnFailure", "Never"),
    "template!": _TEMPLATE,
}
_RULE: Shape = {
    "name!": str,
    "action!": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": [str],
    "targetReplicatedJobs": [str],
}
_SPECS: Mapping[tuple[str, str], Shape] = {
    ("kubeflow.org/v1", "PyTorchJob"): {
        "nprocPerNode!": str,
        "runPolicy!": {
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "cleanPodPolicy": ("All", "Running", "None"),
            "suspend": bool,
            "ttlSecondsAfterFinished": int,
        },
        "pytorchReplicaSpecs!": {"Master!": _REPLICA, "Worker": _REPLICA},
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): {
        "mlPolicy!": {"numNodes!": int, "torch!": {}},
        "template!": {
            "spec!": {
                "failurePolicy!": {"maxRestarts!": int, "rules!": [_RULE]},
                "replicatedJobs!": [
                    {"name!": str, "template!": {"metadata": {"labels": _texts, "annotations": _texts}, "spec!": _JOB}}
                ],
            }
        },
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): {
        "runtimeRef!": {"apiGroup": str, "kind!": str, "name!": str},
        "suspend": bool,
        "trainer!": {
            "numNodes!": int,
            "numProcPerNode!": int,
            "args": [str],
            "command": [str],
            "env": [_ENV],
            "image": str,
        },
    },
    ("batch/v1", "Job"): _JOB,
    ("v1", "Service"): {
        "clusterIP!": str,
        "publishNotReadyAddresses": bool,
        "selector!": _texts,
        "ports": [{"name": str, "port!": int, "protocol": ("TCP", "UDP")}],
    },
    ("v1", "PersistentVolumeClaim"): {
        "accessModes!": [("ReadWriteMany", "ReadOnlyMany", "ReadWriteOnce", "ReadWriteOncePod")],
        "storageClassName": str,
        "resources!": {"requests!": _quantities},
    },
}
_ROOT: Shape = {"apiVersion!": str, "kind!": str, "metadata!": _METADATA}
_CONFIG_MAP: Shape = {**_ROOT, "immutable": bool, "data!": _texts}


def shape_problems(document: Any, subject: str) -> list[Problem]:
    """Unknown fields, wrong types and missing fields of one document.

    Args:
        document: as YAML gave it.
        subject: what it is called in messages.
    """
    if not isinstance(document, dict):
        return [Problem(ExitCode.CONFIG, subject, "must be a mapping with apiVersion and kind")]
    fields = cast("dict[Any, Any]", document)
    kind = (str(fields.get("apiVersion")), str(fields.get("kind")))
    if kind == ("v1", "ConfigMap"):
        return list(_problems(fields, _CONFIG_MAP, subject))
    if kind not in _SPECS:
        known = ", ".join(sorted(f"{name} of {version}" for version, name in {**_SPECS, ("v1", "ConfigMap"): None}))
        return [Problem(ExitCode.CONFIG, subject, f"is none of the kinds that belong to a job: {known}", value=kind)]
    return list(_problems(fields, {**_ROOT, "spec!": _SPECS[kind]}, subject))


def _problems(value: Any, shape: Shape, path: str) -> Iterator[Problem]:
    if isinstance(shape, dict):
        yield from _fields(value, cast("dict[str, Shape]", shape), path)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield Problem(ExitCode.CONFIG, path, "must be a list", value=value)
            return
        for at, each in enumerate(cast("list[Any]", value)):
            yield from _problems(each, cast("list[Shape]", shape)[0], f"{path}[{at}]")
    elif isinstance(shape, tuple):
        if value not in shape:
            words = ", ".join(cast("tuple[str, ...]", shape))
            yield Problem(ExitCode.CONFIG, path, f"must be one of {words}", value=value)
    elif not _fits(value, shape):
        yield Problem(ExitCode.CONFIG, path, f"must be {_EXPECTED[shape]}", value=value)


def _fields(value: Any, shape: Mapping[str, Shape], path: str) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(ExitCode.CONFIG, path, "must be a mapping", value=value)
        return
    known = {name.removesuffix("!"): each for name, each in shape.items()}
    fields = cast("dict[Any, Any]", value)
    for name, each in fields.items():
        if name in known:
            yield from _problems(each, known[name], f"{path}.{name}")
        else:
            close = nearest(str(name), list(known))
            fix = f"did you mean {close}?" if close else f"there are: {', '.join(known)}"
            yield Problem(
                ExitCode.CONFIG, f"{path}.{name}", "unknown field, or one that a job of ours must not have", fix
            )
    for name in shape:
        if name.endswith("!") and name.removesuffix("!") not in fields:
            yield Problem(ExitCode.CONFIG, f"{path}.{name.removesuffix('!')}", "is missing")


def _fits(value: Any, shape: type | Callable[[Any], bool]) -> bool:
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, shape) if isinstance(shape, type) else shape(value)
