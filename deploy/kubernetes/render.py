"""From a checked job file to manifests, one function for each kind: pure, golden files in the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml

from deploy.kubernetes.pods import (
    Node,
    Task,
    claim,
    config_map,
    metadata,
    own_labels,
    pod_template,
    queue_labels,
    restarts,
    suspended,
)
from sft_job.contract import Env, ExitCode

PERMANENT = sorted(int(code) for code in ExitCode if code not in (ExitCode.DONE, ExitCode.LOST, ExitCode.STOPPED))
"""Exit codes after which another start would end the same way."""
COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
TRAINER_PORT = 29500
"""The port that Trainer gives to the ranks; no setting of a TrainJob."""


def render(task: Task) -> list[Node]:
    """The objects of a job, in the order in which they are applied."""
    claims = [] if task.block.checkpoint_size_gib is None else [claim(task)]
    return [*claims, config_map(task), *KINDS[task.block.kind].objects(task)]


def to_yaml(objects: list[Node]) -> str:
    """The objects as YAML documents."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


def pytorch_job(task: Task) -> list[Node]:
    """``kubeflow.org/v1``: the operator sets MASTER_*, RANK (here the pod's index), WORLD_SIZE and PET_*."""
    template = pod_template(task, "pytorch", _nodes(task), "pytorchjob-port", task.block.master_port)
    # ExitCode: 1 to 127 ends the job, what is above starts the pod again. It would retry for ever: the operator does
    # not look at backoffLimit then. The breaker in the run folder ends that with 86.
    replica = {"restartPolicy": "ExitCode", "template": template}
    replicas: Node = {"Master": {"replicas": 1, **replica}}
    if task.job.resources.nodes > 1:
        replicas["Worker"] = {"replicas": task.job.resources.nodes - 1, **replica}
    policy: Node = {"cleanPodPolicy": "Running", "backoffLimit": restarts(task), "suspend": suspended(task)}
    if task.block.ttl_seconds is not None:
        policy["ttlSecondsAfterFinished"] = task.block.ttl_seconds
    spec: Node = {
        "nprocPerNode": str(task.job.ranks_per_node),
        "runPolicy": policy,
        "pytorchReplicaSpecs": replicas,
    }
    about = metadata(task, **queue_labels(task))
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": about, "spec": spec}]


def train_job(task: Task) -> list[Node]:
    """``trainer.kubeflow.org/v1alpha1``: a runtime with the pod, and the TrainJob that starts it.

    Trainer sets PET_* and the number of pods. A pod that was lost ends the child Job, and the JobSet starts all again.
    """
    template = pod_template(task, "node", _nodes(task), "ranks", TRAINER_PORT, restartPolicy="Never")
    container = template["spec"]["containers"][0]
    arguments = container.pop("args")
    child: Node = {
        "backoffLimit": 0,
        "podFailurePolicy": pod_failure_policy("node"),
        "template": template,
    }
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    runtime: Node = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata(task, **{"trainer.kubeflow.org/framework": "torch"}),
        "spec": {
            "mlPolicy": {"numNodes": task.job.resources.nodes, "torch": {}},
            "template": {
                "spec": {
                    # No ttlSecondsAfterFinished: Trainer would make the JobSet again, with new restarts.
                    "failurePolicy": {
                        "maxRestarts": restarts(task),
                        "rules": [
                            {
                                "name": "permanent",
                                "action": "FailJobSet",
                                "onJobFailureReasons": ["PodFailurePolicy"],
                            }
                        ],
                    },
                    "replicatedJobs": [
                        {"name": "node", "template": {"metadata": {"labels": step}, "spec": child}},
                    ],
                }
            },
        },
    }
    trainer: Node = {
        "numNodes": task.job.resources.nodes,
        "numProcPerNode": task.job.ranks_per_node,
        "args": arguments,
    }
    if "command" in container:
        trainer["command"] = container.pop("command")
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(task, **queue_labels(task)),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": task.job.name},
            "suspend": suspended(task),
            "trainer": trainer,
        },
    }
    return [runtime, job]


def indexed_job(task: Task) -> list[Node]:
    """``batch/v1``: an Indexed Job, whose pods find one another through a headless service."""
    name, nodes, port = task.job.name, task.job.resources.nodes, task.block.master_port
    more: list[Node] = []
    if nodes > 1:
        more = [
            {"name": Env.NNODES, "value": str(nodes)},
            {"name": Env.NODE_RANK, "valueFrom": {"fieldRef": {"fieldPath": COMPLETION_INDEX}}},
            {"name": Env.MASTER_ADDR, "value": f"{name}-0.{name}"},
            {"name": Env.MASTER_PORT, "value": str(port)},
        ]
    template = pod_template(task, "sft-job", more, "ranks", port, restartPolicy="Never", subdomain=name)
    spec: Node = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        # One lost pod ends all of a start, and each of them counts.
        "backoffLimit": restarts(task, nodes),
        "podFailurePolicy": pod_failure_policy("sft-job"),
        # The run is done when node 0 says so; a node lost in that moment would wait for it in vain.
        **({"successPolicy": {"rules": [{"succeededIndexes": "0"}]}} if nodes > 1 else {}),
        "suspend": suspended(task),
        "template": template,
    }
    if task.block.ttl_seconds is not None:
        spec["ttlSecondsAfterFinished"] = task.block.ttl_seconds
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(task),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": own_labels(task.block.kind, name),
            "ports": [{"name": "ranks", "port": port}],
        },
    }
    about = metadata(task, **queue_labels(task))
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": spec}]


def pod_failure_policy(container: str) -> Node:
    """What becomes of a Job after a pod's end: over after codes that would come again; a stop counts for nothing.

    Args:
        container: whose codes they are: what a cluster adds to the pod has codes of its own.
    """
    return {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": container, "operator": "In", "values": list(PERMANENT)},
            },
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "Ignore",
                "onExitCodes": {"containerName": container, "operator": "In", "values": [int(ExitCode.STOPPED)]},
            },
        ]
    }


def _nodes(task: Task) -> list[Node]:
    """Beside the operator's PET_NNODES; without that the job would refuse to start, and not train node by node."""
    nodes = task.job.resources.nodes
    return [{"name": Env.NNODES, "value": str(nodes)}] if nodes > 1 else []


@dataclass(frozen=True)
class Kind:
    """One way to start the pods.

    Attributes:
        objects: renders them.
        resource: what kubectl calls the job.
        pod: of rank 0, or a job whose pods all see the run folder, as ``kubectl exec`` takes it.
        log: what ``kubectl logs`` takes for that of the first node.
        needs: what the cluster must have.
        suspend: the patch that suspends the job, or lets it go on, with ``{0}`` for true and false.
        beside: other resources that it consists of, besides the ConfigMap.
    """

    objects: Callable[[Task], list[Node]]
    resource: str
    pod: str
    log: tuple[str, ...]
    needs: str
    suspend: str = '{{"spec":{{"suspend":{0}}}}}'
    beside: tuple[str, ...] = ()


_FIRST_INDEX = ("--tail=-1", "--selector={selector},batch.kubernetes.io/job-completion-index=0")
KINDS: Mapping[str, Kind] = {
    "pytorchjob": Kind(
        pytorch_job,
        "pytorchjobs.kubeflow.org",
        "pod/{name}-master-0",
        ("pod/{name}-master-0",),
        "Kubeflow's training operator (v1.9)",
        '{{"spec":{{"runPolicy":{{"suspend":{0}}}}}}}',
    ),
    "trainjob": Kind(
        train_job,
        "trainjobs.trainer.kubeflow.org",
        "job/{name}-node-0",
        _FIRST_INDEX,
        "Kubeflow Trainer (v2)",
        beside=("trainingruntimes.trainer.kubeflow.org",),
    ),
    "job": Kind(
        indexed_job, "jobs.batch", "job/{name}", _FIRST_INDEX, "Kubernetes 1.31 or later", beside=("services",)
    ),
}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    return cast("Any", dumper).represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _text)
