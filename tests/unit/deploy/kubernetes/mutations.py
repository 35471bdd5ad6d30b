"""Good manifests with one thing wrong in each; the server's part of the refusals is shown by tests/cluster."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.kubernetes.pods import Task
from deploy.kubernetes.render import pod_failure_policy, render, to_yaml
from deploy.kubernetes.settings import KubernetesSettings, check_kubernetes
from sft_job.jobfile.load import load_job

REPOSITORY = Path(__file__).parents[4]
CANARY = "c0ffee" * 6
GONE = object()
_POD = "spec.pytorchReplicaSpecs.Master.template.spec"
_BOX = f"{_POD}.containers.0"
_RUNTIME = "spec.template.spec"
_CHILD = f"{_RUNTIME}.replicatedJobs.0.template"
_JOB_BOX = "spec.template.spec.containers.0"


def loaded(kind: str, *overrides: str) -> Any:
    more = [f"kubernetes.kind={kind}", *overrides]
    path = REPOSITORY / "deploy" / "manifests" / "job.yaml"
    return load_job(path, more, "kubernetes", KubernetesSettings, check_kubernetes)


def good(kind: str, *overrides: str) -> list[dict[str, Any]]:
    """The documents of the ready-made job, as a cluster reads them."""
    return copy.deepcopy(_good(kind, overrides))


@functools.cache
def _good(kind: str, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    found = loaded(kind, *overrides)
    task = Task(found.job, found.block, "sft.yaml", "optim: {lr: 1.0e-5}\n")
    return list(yaml.safe_load_all(to_yaml(render(task))))


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: what is wrong.
        kind: of the job.
        document: kind of the document that is changed.
        path: of the value in it, with points; ``@NAME`` picks by name, ``+`` at its end adds to a list.
        value: ``GONE`` removes it.
        server: a real API server refuses it, too.
        overrides: of the job file.
    """

    name: str
    kind: str
    document: str
    path: str
    value: Any = GONE
    server: bool = False
    overrides: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"

    def documents(self) -> list[dict[str, Any]]:
        found = good(self.kind, *self.overrides)
        if self.path == "":
            return [each for each in found if each["kind"] != self.document]
        at: Any = next(each for each in found if each["kind"] == self.document)
        *parts, last = self.path.split(".")
        for part in parts:
            if part.startswith("@"):
                at = next(each for each in at if each["name"] == part[1:])
            else:
                at = at[int(part)] if isinstance(at, list) else at[part.replace("|", ".")]
        last = last.replace("|", ".")
        if last == "+":
            at.append(self.value)
        elif isinstance(at, list):
            at[int(last)] = self.value
        elif self.value is GONE:
            del at[last]
        else:
            at[last] = self.value
        return found


def _torch(name: str, path: str, value: Any = GONE, **more: Any) -> Mutation:
    return Mutation(name, "pytorchjob", "PyTorchJob", path, value, **more)


def _train(name: str, path: str, value: Any = GONE, **more: Any) -> Mutation:
    return Mutation(name, "trainjob", "TrainJob", path, value, **more)


def _runtime(name: str, path: str, value: Any = GONE, **more: Any) -> Mutation:
    return Mutation(name, "trainjob", "TrainingRuntime", path, value, **more)


def _job(name: str, path: str, value: Any = GONE, **more: Any) -> Mutation:
    return Mutation(name, "job", "Job", path, value, **more)


def _variable(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}


def _codes(action: str, *values: int, operator: str = "In") -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": operator, "values": list(values)}}


_RULES = pod_failure_policy("sft-job")["rules"]
_MASTER = "spec.pytorchReplicaSpecs.Master.template"
_APPARMOR = "container.apparmor.security.beta.kubernetes.io"
_SECCOMP = "seccomp.security.alpha.kubernetes.io"

MUTATIONS = [
    _torch("a field that does not exist", "spec.foo", 1, server=True),
    _torch("a misspelt field deep in a container", f"{_BOX}.imag", "x", server=True),
    _torch("a number as a word", "spec.pytorchReplicaSpecs.Worker.replicas", "two", server=True),
    _torch("ranks as a number", "spec.nprocPerNode", 8, server=True),
    _torch("ranks as an unknown word", "spec.nprocPerNode", "all"),
    _torch("an unknown restart policy", "spec.pytorchReplicaSpecs.Master.restartPolicy", "Sometimes"),
    _torch("a policy that retries everything", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "OnFailure"),
    _torch("two masters", "spec.pytorchReplicaSpecs.Master.replicas", 2),
    _torch("no master", "spec.pytorchReplicaSpecs.Master"),
    _torch("an unknown role", "spec.pytorchReplicaSpecs.Chief", {"replicas": 1}),
    _torch("a container of another name", f"{_BOX}.name", "trainer"),
    _torch("no image", f"{_BOX}.image"),
    _torch("a variable of the operator", f"{_BOX}.env.+", _variable("PET_NNODES", "2")),
    _torch("a variable of the ranks", f"{_BOX}.env.+", _variable("RANK", "0")),
    _torch("a variable twice", f"{_BOX}.env.+", _variable("CHECKPOINT_DIR", "/other"), server=True),
    _torch("a number as a variable's value", f"{_BOX}.env.0.value", 8, server=True),
    _torch("no run folder", f"{_BOX}.env", []),
    _torch("a literal secret", f"{_BOX}.env.+", _variable("WANDB_API_KEY_2", CANARY)),
    _torch("a key that says so itself", f"{_BOX}.args.+", "trainer.note=hf_" + "a1B2c3D4e5" * 3),
    _torch("may run as root", f"{_POD}.securityContext.runAsNonRoot"),
    _torch("runs as root", f"{_POD}.securityContext.runAsUser", 0),
    _torch("no system call filter", f"{_POD}.securityContext.seccompProfile"),
    _torch("no security context", f"{_BOX}.securityContext"),
    _torch("may gain rights", f"{_BOX}.securityContext.allowPrivilegeEscalation", True),
    _torch("keeps capabilities", f"{_BOX}.securityContext.capabilities"),
    _torch("adds a capability", f"{_BOX}.securityContext.capabilities.add", ["IPC_LOCK"]),
    _torch("privileged", f"{_BOX}.securityContext.privileged", True),
    _torch("writes its root", f"{_BOX}.securityContext.readOnlyRootFilesystem", False),
    _torch("a folder of the node", f"{_POD}.volumes.+", {"name": "host", "hostPath": {"path": "/"}}),
    _torch("the node's network", f"{_POD}.hostNetwork", True),
    _torch("a key to the cluster", f"{_POD}.automountServiceAccountToken", True),
    _torch("shm is not counted", f"{_BOX}.resources.limits.memory", "32Gi"),
    _torch("requests less than it may use", f"{_BOX}.resources.requests.memory", "100Gi"),
    _torch("no limits", f"{_BOX}.resources"),
    _torch("shm of any size", f"{_POD}.volumes.@shm.emptyDir.sizeLimit"),
    _torch("no shm", f"{_POD}.volumes.@shm.emptyDir.medium"),
    _torch("a volume that is not there", f"{_BOX}.volumeMounts.+", {"name": "x", "mountPath": "/x"}),
    _torch("a volume without a source", f"{_POD}.volumes.+", {"name": "x"}),
    _torch("no grace", f"{_POD}.terminationGracePeriodSeconds"),
    _torch("too little grace", f"{_POD}.terminationGracePeriodSeconds", 5),
    _torch("grace as a text", f"{_POD}.terminationGracePeriodSeconds", "60s", server=True),
    _torch("a deadline of all starts", "spec.runPolicy.activeDeadlineSeconds", 3600),
    _torch("a misspelt clean-up", "spec.runPolicy.cleanPodPolicy", "Runing"),
    _torch("a queue, and running", "metadata.labels.kueue|x-k8s|io/queue-name", "team"),
    _torch("a name with capitals", "metadata.name", "Sft", server=True),
    _torch("a label that is a number", "metadata.labels.team", 7, server=True),
    Mutation("no config", "pytorchjob", "ConfigMap", ""),
    Mutation("a misspelt field of the config", "pytorchjob", "ConfigMap", "dat", {"a": "b"}, server=True),
    Mutation("a secret in the config", "job", "ConfigMap", "data.sft|yaml", "key: hf_" + "a1B2c3D4e5" * 3),
    Mutation("one node's claim", "pytorchjob", "PersistentVolumeClaim", "spec.accessModes", ["ReadWriteOnce"]),
    Mutation("one node's claim", "job", "PersistentVolumeClaim", "spec.accessModes", ["ReadWriteOnce"]),
    Mutation("misspelt modes", "job", "PersistentVolumeClaim", "spec.accesModes", ["ReadWriteMany"], server=True),
    _train("ranks as a text", "spec.trainer.numProcPerNode", "8", server=True),
    _train("no runtime", "spec.runtimeRef", server=True),
    _train("another runtime", "spec.runtimeRef.name", "other"),
    _train("a variable of Trainer", "spec.trainer.env", [_variable("PET_MASTER_ADDR", "x")]),
    _train("a literal secret", "spec.trainer.env", [_variable("HF_TOKEN", CANARY)]),
    _train("another controller", "spec.managedBy", "me", server=True),
    _train("a name that begins with a digit", "metadata.name", "1-sft", server=True),
    _train("no nodes", "spec.trainer.numNodes", 0),
    _runtime("a container of another name", f"{_CHILD}.spec.template.spec.containers.0.name", "pytorch"),
    _runtime("no framework", "metadata.labels.trainer|kubeflow|org/framework"),
    _runtime("pods that Trainer does not find", f"{_CHILD}.metadata"),
    _runtime("a job of another name", f"{_RUNTIME}.replicatedJobs.0.name", "worker"),
    _runtime("an unknown action", f"{_RUNTIME}.failurePolicy.rules.0.action", "FailJob", server=True),
    _runtime("retries what will not change", f"{_RUNTIME}.failurePolicy.rules", []),
    _runtime("a JobSet that is made again", f"{_RUNTIME}.ttlSecondsAfterFinished", 60),
    _runtime("two policies", "spec.mlPolicy.mpi", {"numProcPerNode": 8}, server=True),
    _job("a misspelt mode", "spec.completionModus", "Indexed", server=True),
    _job("completions as a word", "spec.completions", "two", server=True),
    _job("pods without an index", "spec.completionMode", "NonIndexed"),
    _job("one node after the other", "spec.parallelism", 1),
    _job("restarts in place", "spec.template.spec.restartPolicy", "OnFailure"),
    _job("a limit as a text", "spec.backoffLimit", "6", server=True),
    _job("retries a wrong config", "spec.podFailurePolicy.rules.0.onExitCodes.values", [1, 65, 66, 73, 74, 86, 87, 88]),
    _job("fails when stopped", "spec.podFailurePolicy.rules.0.onExitCodes.values.+", 143),
    _job("counts evictions", "spec.podFailurePolicy.rules.1.onPodConditions.0.type", "Ready"),
    _job("an unknown operator", "spec.podFailurePolicy.rules.0.onExitCodes.operator", "Is"),
    _job("a fixed rank", f"{_JOB_BOX}.env.@NODE_RANK.valueFrom.fieldRef.fieldPath", "metadata.name"),
    _job("too few nodes", f"{_JOB_BOX}.env.@NNODES.value", "1"),
    _job("another first node", f"{_JOB_BOX}.env.@MASTER_ADDR.value", "localhost"),
    Mutation("no service", "job", "Service", ""),
    Mutation("a service with an address", "job", "Service", "spec.clusterIP", "10.0.0.7"),
    Mutation("a service of others", "job", "Service", "spec.selector", {"app": "other"}),
    Mutation("a port as a word", "job", "Service", "spec.ports.0.port", "ranks", server=True),
    _job("a deadline of all starts", "spec.activeDeadlineSeconds", 3600),
    _job("a config error that is ignored first", "spec.podFailurePolicy.rules", [_codes("Ignore", 2), *_RULES]),
    _job("any code fails", "spec.podFailurePolicy.rules", [_codes("FailJob", 0, operator="NotIn"), *_RULES]),
    _job("evictions fail", "spec.podFailurePolicy.rules", [{**_RULES[1], "action": "FailJob"}, *_RULES]),
    _job("codes of another container", "spec.podFailurePolicy.rules.0.onExitCodes.containerName", "proxy"),
    _job("a rule with two conditions", "spec.podFailurePolicy.rules.1.onExitCodes", {"operator": "In", "values": [9]}),
    _job("a second pod beside one that leaves", "spec.podReplacementPolicy", "TerminatingOrFailed"),
    _job("done when any node is", "spec.successPolicy", {"rules": [{"succeededCount": 1}]}),
    _job("nowhere to write", f"{_JOB_BOX}.volumeMounts.0.mountPath", "/scratch"),
    _job("no claim for the run", f"{_JOB_BOX}.env.@CHECKPOINT_DIR.value", "/tmp/runs"),
    _job("a run folder to read", f"{_JOB_BOX}.volumeMounts.@checkpoints.readOnly", True),
    _job("a claim to read", "spec.template.spec.volumes.@checkpoints.persistentVolumeClaim.readOnly", True),
    _job("two mounts on one path", f"{_JOB_BOX}.volumeMounts.@data-1.mountPath", "/models/"),
    _job("a profile without a name", "spec.template.spec.securityContext.seccompProfile", {"type": "Localhost"}),
    _job("no system call filter", "spec.template.metadata.annotations", {f"{_SECCOMP}/pod": "unconfined"}),
    _job("a secret in an annotation", "metadata.annotations", {"example.org/api-token": CANARY}),
    _job("a secret in a label", "spec.template.metadata.labels.wandb-api-key", CANARY),
    Mutation("a claim that is read", "job", "PersistentVolumeClaim", "spec.accessModes", ["ReadOnlyMany"]),
    Mutation("a key that begins with points", "job", "ConfigMap", "data", {"..sft.yaml": "a: 1"}),
    _torch("no profile", f"{_MASTER}.metadata.annotations", {f"{_APPARMOR}/pytorch": "unconfined"}),
    _torch("other ranks than the operator's", "spec.nprocPerNode", "4"),
    _torch("other nodes than the operator's", f"{_BOX}.env.@NNODES.value", "3"),
    _train("other nodes than the runtime's", "spec.trainer.numNodes", 3),
    _train("other ranks than the runtime's", "spec.trainer.numProcPerNode", 4),
    _runtime("a deadline of all starts", f"{_CHILD}.spec.activeDeadlineSeconds", 3600),
    _runtime("done when node 0 is", f"{_CHILD}.spec.successPolicy", {"rules": [{"succeededIndexes": "0"}]}),
]
