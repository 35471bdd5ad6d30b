"""The pod that every kind starts: pure functions from settings to nested dictionaries."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from deploy.kubernetes.settings import (
    CONFIG_FOLDER,
    LEAVE_SECONDS,
    SCRATCH,
    SHM,
    TOLERATION,
    KubernetesSettings,
    parse_claim,
    wall_seconds,
)
from sft_job.contract import Env
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import seconds_of

Node = dict[str, Any]
"""A part of a manifest."""

NAME, INSTANCE, MANAGER = "app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
"""The kind: jobs of two kinds may have one name."""
QUEUE = "kueue.x-k8s.io/queue-name"
_APP = "sft-job"
_NAMESPACE = "SFT_JOB_NAMESPACE"
_MOST = 2147483647
# The image's entry point is tini and ``sft-job``. With a look at the nodes before, whose exit code counts, too:
# tini passes the stop signal to all of them: a shell as the first process would not heed it.
_PREFLIGHT = 'sft-job preflight "$@" || exit "$?"; exec sft-job train "$@"'


@dataclass(frozen=True)
class Task:
    """What is to be rendered.

    Attributes:
        job: what every launcher reads.
        block: the launcher's own settings.
        config_name: file name of the run's YAML.
        config: its text.
    """

    job: JobFile
    block: KubernetesSettings
    config_name: str
    config: str

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap: another config has another name, so a job that waits keeps its own."""
        digest = hashlib.sha256(f"{self.block.kind}\0{self.config_name}\0{self.config}".encode()).hexdigest()
        return f"{self.job.name}-config-{digest[:10]}"


def metadata(task: Task, name: str | None = None, **labels: str) -> Node:
    """Name, namespace, labels and annotations of an object."""
    found: Node = {"name": name or task.job.name}
    if task.block.namespace is not None:
        found["namespace"] = task.block.namespace
    found["labels"] = object_labels(task) | labels
    if task.block.annotations:
        found["annotations"] = dict(task.block.annotations)
    return found


def object_labels(task: Task) -> dict[str, str]:
    """Labels of the job, its pods, and what belongs to them."""
    return {**own_labels(task.block.kind, task.job.name), **task.block.labels}


def own_labels(kind: str, name: str) -> dict[str, str]:
    """The labels by which the job's objects are found; together no other application has them."""
    return {NAME: _APP, INSTANCE: name, MANAGER: _APP, COMPONENT: kind}


def job_id(namespace: str, kind: str, name: str) -> str:
    """``SFT_JOB_ID``, also the id under which a submission is recorded: a namespace and a kind hold no point."""
    return f"{namespace}.{kind}.{name}"


def queue_labels(task: Task) -> dict[str, str]:
    """Kueue's label, on the job itself alone."""
    return {QUEUE: task.block.queue} if task.block.queue else {}


def suspended(task: Task) -> bool:
    """Whether the job is made suspended."""
    return task.block.suspend or task.block.queue is not None


def restarts(task: Task, times: int = 1) -> int:
    """How often pods may fail, each restart counting so many times."""
    losses = task.job.retries.losses
    return _MOST if losses is None else min(_MOST, losses * times)


def config_map(task: Task) -> Node:
    """The run's YAML as it was when the job was submitted."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(task, task.config_map),
        "immutable": True,
        "data": {task.config_name: task.config},
    }


def claim(task: Task) -> Node:
    """The claim of the run folder; it outlives the job, so it has no label by which the job is removed."""
    spec: Node = {"accessModes": [task.block.checkpoint_access]}
    if task.block.storage_class is not None:
        spec["storageClassName"] = task.block.storage_class
    spec["resources"] = {"requests": {"storage": gibibytes(task.block.checkpoint_size_gib or 0)}}
    about = metadata(task, task.block.checkpoint_claim)
    for label in (INSTANCE, COMPONENT):  # and jobs of any kind may use it
        del about["labels"][label]
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": about, "spec": spec}


def pod_template(task: Task, container: str, more: list[Node], port_name: str, port: int, **extra: Any) -> Node:
    """The pod of one node.

    Args:
        task: what is to be rendered.
        container: name of the container.
        more: variables of this kind.
        port_name: name of the port at which the ranks meet.
        port: its number.
        extra: further fields of the pod's specification.
    """
    about: Node = {"labels": object_labels(task)}
    if task.block.annotations:
        about["annotations"] = dict(task.block.annotations)
    block, job = task.block, task.job
    spec: Node = {
        **extra,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.grace_seconds + LEAVE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": block.user,
            "runAsGroup": block.group,
            "fsGroup": block.group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    seconds = seconds_of(job.resources.time or "")
    if seconds is not None:  # the hard end of this pod, should the run not have ended by itself before (_command)
        spec["activeDeadlineSeconds"] = seconds
    for name, value in (
        ("serviceAccountName", block.service_account),
        ("priorityClassName", block.priority_class),
        ("runtimeClassName", block.runtime_class),
        ("nodeSelector", dict(block.node_selector)),
        ("tolerations", [_toleration(each) for each in block.tolerations]),
        ("imagePullSecrets", [{"name": each} for each in block.image_pull_secrets]),
    ):
        if value:
            spec[name] = value
    volumes, mounts = _volumes(task)
    spec["containers"] = [
        {
            "name": container,
            "image": job.image,
            "imagePullPolicy": block.image_pull_policy,
            **_command(task),
            "env": _environment(task, more),
            "ports": [{"name": port_name, "containerPort": port}],
            "resources": _resources(task),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
            "volumeMounts": mounts,
        }
    ]
    spec["volumes"] = volumes
    return {"metadata": about, "spec": spec}


def gibibytes(size: float) -> str:
    """A quantity: whole MiB, or GiB where it is whole."""
    mebibytes = math.ceil(size * 1024)
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"


def plain(text: str) -> str:
    """The text as Kubernetes must get it: it would put variables in the place of ``$(NAME)``."""
    return text.replace("$(", "$$(")


def _command(task: Task) -> Node:
    overrides = list(task.job.overrides)
    seconds = seconds_of(task.job.resources.time or "")
    if seconds is not None:
        # So that a start which comes no further counts for the breaker: a pod's own deadline is a stop signal, as a
        # preemption is, and those do not count. Before the user's own overrides, which count for more.
        overrides.insert(0, f"trainer.max_wall_seconds={wall_seconds(task.job, seconds)}")
    arguments = [str(PurePosixPath(CONFIG_FOLDER) / task.config_name), *map(plain, overrides)]
    if task.job.preflight:
        return {"command": ["tini", "-g", "--", "sh", "-c", plain(_PREFLIGHT), "sft-job"], "args": arguments}
    return {"args": ["train", *arguments]}


def _environment(task: Task, more: list[Node]) -> list[Node]:
    job = task.job
    values = {
        Env.CHECKPOINT_DIR: job.checkpoint_dir,
        # The one folder that can be written besides the claims.
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "XDG_CACHE_HOME": f"{SCRATCH}/cache",
        "HF_HOME": f"{SCRATCH}/cache/huggingface",
        Env.NPROC_PER_NODE: str(job.ranks_per_node),
    }
    if job.resources.gpus_per_node:
        values[Env.GPUS_PER_NODE] = str(job.resources.gpus_per_node)
    values |= job.environment
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": dict(zip(("name", "key"), reference.split("/", 1), strict=True))}}
        for name, reference in task.block.secrets.items()
        if name not in job.environment
    ]
    # Asked of the pod: manifests may be applied in any namespace. Kubernetes puts the one into the other.
    own = [
        {"name": _NAMESPACE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": Env.JOB_ID, "value": job_id(f"$({_NAMESPACE})", task.block.kind, job.name)},
    ]
    return [*({"name": name, "value": plain(value)} for name, value in values.items()), *own, *more, *secrets]


def _resources(task: Task) -> Node:
    """Requests equal limits, so that nobody else's use of the node ends the job; ``/dev/shm`` is part of the memory."""
    resources = task.job.resources
    found: dict[str, str] = {"memory": gibibytes((resources.memory_gib or 0) + resources.shm_gib)}
    if resources.cpus_per_node is not None:
        found["cpu"] = str(resources.cpus_per_node)
    if resources.gpus_per_node:
        found[task.block.gpu_resource] = str(resources.gpus_per_node)
    found |= task.block.resources
    return {"requests": found, "limits": dict(found)}


def _volumes(task: Task) -> tuple[list[Node], list[Node]]:
    """Volumes of the pod, and where the container sees them; a folder comes before what lies in it."""
    block = task.block
    volumes: list[Node] = [
        {"name": "config", "configMap": {"name": task.config_map}},
        {"name": "scratch", "emptyDir": {"sizeLimit": gibibytes(block.scratch_gib)}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": gibibytes(task.job.resources.shm_gib)}},
    ]
    mounts: list[Node] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "shm", "mountPath": SHM},
    ]
    claims = [parse_claim(each) for each in block.claims]
    checkpoints = block.checkpoint_claim or ""
    writable = {checkpoints, *(each.name for each in claims if each.writable)}
    names = {checkpoints: "checkpoints"}
    for each in claims:
        names.setdefault(each.name, f"data-{len(names)}")
    for source, name in names.items():
        only = {} if source in writable else {"readOnly": True}
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": source, **only}})
    mounts.append({"name": "checkpoints", "mountPath": str(PurePosixPath(task.job.checkpoint_dir))})
    for each in claims:
        only = {} if each.writable else {"readOnly": True}
        mounts.append({"name": names[each.name], "mountPath": each.path, **only})
    return volumes, sorted(mounts, key=lambda mount: len(PurePosixPath(mount["mountPath"]).parts))


def _toleration(text: str) -> Node:
    found = TOLERATION.fullmatch(text)
    if found is None:
        raise ValueError(f"not a toleration: {text!r}")
    toleration: Node = {"key": found["key"], "operator": "Exists" if found["value"] is None else "Equal"}
    for name in ("value", "effect"):
        if found[name] is not None:
            toleration[name] = found[name]
    if found["seconds"] is not None:
        toleration["tolerationSeconds"] = int(found["seconds"])
    return toleration
