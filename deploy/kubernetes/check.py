"""What is wrong with manifests, found without a cluster: before every submission, and on what people edited by hand.

Besides the fields and their types (``shape``): what an API server lets through although the job would not work, and an
operator's webhook may or may not refuse; Pod Security's ``restricted``; secrets that stand in clear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from deploy.kubernetes.pods import QUEUE, Node
from deploy.kubernetes.render import COMPLETION_INDEX, PERMANENT
from deploy.kubernetes.settings import LEAVE_SECONDS, SHM, SINGLE, is_name
from deploy.kubernetes.shape import shape_problems
from sft_job.config.secrets import SecretMask
from sft_job.contract import Env, ExitCode
from sft_job.errors import Problem

_SHORTEST_GRACE = LEAVE_SECONDS + 1
_UNITS: Mapping[str, Fraction | int] = {
    **{"": 1, "m": Fraction(1, 1000), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    **{"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40},
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_VOLUMES = ("configMap", "secret", "emptyDir", "persistentVolumeClaim")
_OWN_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_NODES = (Env.NNODES, Env.NODE_RANK, Env.MASTER_ADDR, Env.MASTER_PORT)


@dataclass(frozen=True)
class _Pod:
    """A pod template of a document.

    Attributes:
        path: where it stands.
        spec: its specification.
        labels: its labels.
        container: name that its container must have; '' = any.
        count: how many pods it makes.
    """

    path: str
    spec: Node
    labels: Mapping[str, str]
    container: str
    count: int

    def containers(self) -> Iterator[tuple[str, Node]]:
        for at, each in enumerate(self.spec["containers"]):
            yield f"{self.path}.containers[{at}]", each


def check_manifests(documents: Sequence[Any]) -> list[Problem]:
    """Everything that is wrong with the objects of one job.

    Args:
        documents: of one or several files, as YAML gave them.
    """
    given = [each for each in documents if each is not None]
    problems = [found for each in given for found in shape_problems(each, _subject(each))]
    if problems:
        return problems  # the rules below read fields that must be there
    found = _Found()
    for each in cast("list[Node]", given):
        _check_document(each, given, found)
    return found.problems


def _subject(document: Any) -> str:
    if not isinstance(document, dict):
        return "document"
    about = cast("Node", document).get("metadata")
    name = cast("Node", about).get("name", "") if isinstance(about, dict) else ""
    return f"{cast('Node', document).get('kind', 'document')} {name}".strip()


class _Found:
    """Collects problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, holds: object, subject: str, rule: str, fix: str = "") -> None:
        if not holds:
            self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix))


def _check_document(document: Node, documents: Sequence[Node], check: _Found) -> None:
    subject, kind = _subject(document), document["kind"]
    _check_texts(document, subject, check)
    named = kind in ("ConfigMap", "PersistentVolumeClaim") or is_name(document["metadata"]["name"])
    check(named, f"{subject}.metadata.name", "must be small letters, digits and -, at most 40")
    if QUEUE in document["metadata"].get("labels", {}):
        policy = document["spec"].get("runPolicy", document["spec"])
        rule = "Kueue starts a job of its queues; made running, it would start without Kueue's leave"
        check(policy.get("suspend") is True, f"{subject}.spec", rule, "suspend: true")
    if kind == "PyTorchJob":
        _check_pytorch_job(document, subject, check)
    elif kind == "TrainJob":
        _check_train_job(document, documents, subject, check)
    elif kind == "TrainingRuntime":
        _check_runtime(document, subject, check)
    elif kind == "Job":
        _check_job(document, documents, subject, check)
    for pod in _pods(document, subject):
        _check_pod(pod, check)
        _check_variables(pod, kind, check)
        _check_claims(pod, documents, check)
        _check_config(pod, documents, check)


def _pods(document: Node, subject: str) -> Iterator[_Pod]:
    spec, kind = document.get("spec", {}), document["kind"]
    if kind == "PyTorchJob":
        for role, replica in spec["pytorchReplicaSpecs"].items():
            path = f"{subject}.spec.pytorchReplicaSpecs.{role}.template"
            yield _pod(path, replica["template"], "pytorch", replica["replicas"])
    elif kind == "TrainingRuntime":
        for at, each in enumerate(spec["template"]["spec"]["replicatedJobs"]):
            path = f"{subject}.spec.template.spec.replicatedJobs[{at}].template.spec.template"
            yield _pod(path, each["template"]["spec"]["template"], "node", spec["mlPolicy"]["numNodes"])
    elif kind == "Job":
        yield _pod(f"{subject}.spec.template", spec["template"], "", spec.get("completions", 1))


def _pod(path: str, template: Node, container: str, count: int) -> _Pod:
    labels = template.get("metadata", {}).get("labels", {})
    return _Pod(f"{path}.spec", template["spec"], labels, container, count)


def _check_pytorch_job(document: Node, subject: str, check: _Found) -> None:
    spec = document["spec"]
    words = spec["nprocPerNode"] in ("auto", "gpu", "cpu")
    good = words or (spec["nprocPerNode"].isdecimal() and int(spec["nprocPerNode"]) > 0)
    check(good, f"{subject}.spec.nprocPerNode", "must be a number in quotes, or auto, gpu or cpu")
    replicas = spec["pytorchReplicaSpecs"]
    check(
        replicas["Master"]["replicas"] == 1, f"{subject}.spec.pytorchReplicaSpecs.Master.replicas", "there is 1 master"
    )
    for role, replica in replicas.items():
        path = f"{subject}.spec.pytorchReplicaSpecs.{role}"
        check(replica["replicas"] > 0, f"{path}.replicas", "must be 1 or more", "leave Worker out for one node")
        rule = "any other policy starts a job again that would end the same way, or one never that was stopped"
        check(replica["restartPolicy"] == "ExitCode", f"{path}.restartPolicy", rule, "restartPolicy: ExitCode")
        own = "restartPolicy" in replica["template"]["spec"]
        check(not own, f"{path}.template.spec.restartPolicy", "the operator sets it from the replica's policy")
    deadline = "activeDeadlineSeconds" in spec["runPolicy"]
    rule = "ends the job for good, its later starts included"
    fix = "activeDeadlineSeconds of the pods, which limits each start"
    check(not deadline, f"{subject}.spec.runPolicy.activeDeadlineSeconds", rule, fix)


def _check_train_job(document: Node, documents: Sequence[Node], subject: str, check: _Found) -> None:
    spec = document["spec"]
    ref = spec["runtimeRef"]
    if ref["kind"] == "TrainingRuntime":
        there = any(each["kind"] == "TrainingRuntime" and each["metadata"]["name"] == ref["name"] for each in documents)
        rule = f"there is no TrainingRuntime {ref['name']} beside it"
        check(there, f"{subject}.spec.runtimeRef.name", rule)
    for name in ("numNodes", "numProcPerNode"):
        check(spec["trainer"][name] > 0, f"{subject}.spec.trainer.{name}", "must be 1 or more")
    for at, each in enumerate(spec["trainer"].get("env", [])):
        rule = "Trainer sets these variables itself"
        path = f"{subject}.spec.trainer.env[{at}].name"
        check(not each["name"].startswith("PET_") and each["name"] not in (*_OWN_RANKS, *_NODES), path, rule)
        _check_literal(each, path, check)


def _check_runtime(document: Node, subject: str, check: _Found) -> None:
    framework = document["metadata"].get("labels", {}).get("trainer.kubeflow.org/framework")
    path = f"{subject}.metadata.labels"
    check(framework == "torch", path, "Trainer needs the label trainer.kubeflow.org/framework: torch")
    spec = document["spec"]["template"]["spec"]
    path = f"{subject}.spec.template.spec"
    rule = "jobs that ended by their exit code must end the JobSet"
    fails = any(
        each["action"] == "FailJobSet" and "PodFailurePolicy" in each.get("onJobFailureReasons", [])
        for each in spec["failurePolicy"]["rules"]
    )
    check(fails, f"{path}.failurePolicy", rule, "a rule FailJobSet with onJobFailureReasons: [PodFailurePolicy]")
    jobs = spec["replicatedJobs"]
    check([each["name"] for each in jobs] == ["node"], f"{path}.replicatedJobs", "must be one, named node")
    for at, each in enumerate(jobs):
        labels = each["template"].get("metadata", {}).get("labels", {})
        rule = "Trainer finds the pods by the label trainer.kubeflow.org/trainjob-ancestor-step: trainer"
        step = labels.get("trainer.kubeflow.org/trainjob-ancestor-step")
        check(step == "trainer", f"{path}.replicatedJobs[{at}].template.metadata.labels", rule)
        job = f"{path}.replicatedJobs[{at}].template.spec"
        _check_failure_policy(each["template"]["spec"], job, check)
        rule = "Trainer would make the JobSet again, and the run with it"
        check("ttlSecondsAfterFinished" not in each["template"]["spec"], f"{job}.ttlSecondsAfterFinished", rule)


def _check_job(document: Node, documents: Sequence[Node], subject: str, check: _Found) -> None:
    spec = document["spec"]
    path = f"{subject}.spec"
    nodes = spec.get("completions", 1)
    check(spec.get("completionMode") == "Indexed", f"{path}.completionMode", "pods need an index: Indexed")
    same = nodes == spec.get("parallelism", 1) and nodes > 0
    check(same, f"{path}.parallelism", "all nodes must run at once: as many as completions")
    _check_failure_policy(spec, path, check)
    if nodes == 1:
        return
    pod = spec["template"]["spec"]
    labels = spec["template"].get("metadata", {}).get("labels", {}).items()
    rule = "pods find one another through a headless Service of this name, beside the Job, that selects them"
    name = pod.get("subdomain")
    there = any(
        each["kind"] == "Service"
        and each["metadata"]["name"] == name
        and each["spec"]["clusterIP"] == "None"
        and each["spec"]["selector"].items() <= labels
        for each in documents
    )
    check(there, f"{path}.template.spec.subdomain", rule)
    variables = {each["name"]: each for each in pod["containers"][0].get("env", [])}
    index = variables.get(Env.NODE_RANK, {}).get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
    path = f"{path}.template.spec.containers[0].env"
    check(index == COMPLETION_INDEX, path, f"{Env.NODE_RANK} must be the pod's completion index: {COMPLETION_INDEX}")
    first = f"{document['metadata']['name']}-0.{name}"
    for variable, wanted in ((Env.NNODES, str(nodes)), (Env.MASTER_ADDR, first)):
        check(variables.get(variable, {}).get("value") == wanted, path, f"{variable} must be {wanted!r}")
    check(Env.MASTER_PORT in variables, path, f"{Env.MASTER_PORT} is missing")


def _check_failure_policy(spec: Node, path: str, check: _Found) -> None:
    policy = spec.get("template", {}).get("spec", {}).get("restartPolicy")
    rule = "podFailurePolicy sees exit codes only of pods that are never started again in place"
    check(policy == "Never", f"{path}.template.spec.restartPolicy", rule, "restartPolicy: Never")
    failing: set[int] = set()
    ignored = False
    for each in spec.get("podFailurePolicy", {"rules": []})["rules"]:
        codes = each.get("onExitCodes", {"operator": "In", "values": []})
        if each["action"] == "FailJob" and codes["operator"] == "In":
            failing |= set(codes["values"])
        ignored |= each["action"] == "Ignore" and any(
            condition["type"] == "DisruptionTarget" for condition in each.get("onPodConditions", [])
        )
    path = f"{path}.podFailurePolicy"
    rule = f"a job that ends with one of {', '.join(map(str, PERMANENT))} must fail, and with no other code"
    check(failing == set(PERMANENT), path, rule)
    check(ignored, path, "pods that make room for others must not count", "Ignore on DisruptionTarget")


def _check_pod(pod: _Pod, check: _Found) -> None:
    spec, path = pod.spec, pod.path
    names = [each["name"] for _, each in pod.containers()]
    rule = f"the job's container must be named {pod.container}, or its operator does not find it"
    check(not pod.container or pod.container in names, f"{path}.containers", rule)
    check(len(names) > 0, f"{path}.containers", "is empty")
    token = spec.get("automountServiceAccountToken") is False
    check(token, f"{path}.automountServiceAccountToken", "training needs no key to the cluster", "false")
    grace = spec.get("terminationGracePeriodSeconds", 0)
    rule = f"must be {_SHORTEST_GRACE} or more: a step and a save happen in it"
    check(
        grace >= _SHORTEST_GRACE, f"{path}.terminationGracePeriodSeconds", rule, "grace_seconds of the job file, + 15"
    )
    own = spec.get("securityContext", {})
    for subject, container in pod.containers():
        check(container["image"].strip(), f"{subject}.image", "must name an image")
        _check_security(own, container.get("securityContext", {}), path, subject, check)
    _check_memory(pod, check)
    for at, each in enumerate(spec.get("volumes", [])):
        rule = f"must have exactly one source, of {', '.join(_VOLUMES)}"
        check(sum(kind in each for kind in _VOLUMES) == 1, f"{path}.volumes[{at}]", rule)
    known = {each["name"] for each in spec.get("volumes", [])}
    for subject, container in pod.containers():
        for at, each in enumerate(container.get("volumeMounts", [])):
            rule = f"there is no volume {each['name']}"
            check(each["name"] in known, f"{subject}.volumeMounts[{at}]", rule)


def _check_security(pod: Node, container: Node, path: str, subject: str, check: _Found) -> None:
    """Pod Security's ``restricted``, and a root that cannot be written."""
    level = "Pod Security 'restricted' wants it"
    both = {**pod, **container}
    check(both.get("runAsNonRoot") is True, f"{path}.securityContext.runAsNonRoot", level, "true")
    check(both.get("runAsUser", 0) > 0, f"{path}.securityContext.runAsUser", f"must be set, and not root: {level}")
    profile = both.get("seccompProfile", {}).get("type")
    check(profile is not None, f"{path}.securityContext.seccompProfile", level, "type: RuntimeDefault")
    where = f"{subject}.securityContext"
    escalation = container.get("allowPrivilegeEscalation") is False
    check(escalation, f"{where}.allowPrivilegeEscalation", level, "false")
    check("ALL" in container.get("capabilities", {}).get("drop", []), f"{where}.capabilities.drop", level, "[ALL]")
    check(container.get("readOnlyRootFilesystem") is True, f"{where}.readOnlyRootFilesystem", "must be true")


def _check_memory(pod: _Pod, check: _Found) -> None:
    """What lies in ``/dev/shm`` is memory of the container that wrote it."""
    sizes = {
        each["name"]: each["emptyDir"].get("sizeLimit")
        for each in pod.spec.get("volumes", [])
        if each.get("emptyDir", {}).get("medium") == "Memory"
    }
    for name, size in sizes.items():
        rule = "a volume in memory needs a size, or half of the node's memory is its"
        check(size is not None and _bytes(size) is not None, f"{pod.path}.volumes ({name}).emptyDir.sizeLimit", rule)
    for subject, container in pod.containers():
        mounted = {each["name"]: each["mountPath"] for each in container.get("volumeMounts", [])}
        shared = sum(_bytes(size) or 0 for name, size in sizes.items() if name in mounted)
        check(SHM in {mounted.get(name) for name in sizes}, subject, f"{SHM} has 64 MB without a volume in memory")
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        memory = _bytes(limits.get("memory", "0"))
        rule = f"must be more than the {float(shared / 2**30):g} GiB of volumes in memory, which count as memory"
        fix = "memory_gib and shm_gib of the job file, together"
        check(memory is not None and memory > shared, f"{subject}.resources.limits.memory", rule, fix)
        rule = "must be what limits say: what is not requested may be used by others, and the job killed for it"
        check(limits == requests, f"{subject}.resources.requests", rule)


def _bytes(quantity: Any) -> Fraction | None:
    found = _QUANTITY.fullmatch(str(quantity))
    return None if found is None else Fraction(found[1]) * _UNITS[found[2] or ""]


def _check_variables(pod: _Pod, kind: str, check: _Found) -> None:
    for subject, container in pod.containers():
        seen: set[str] = set()
        for at, each in enumerate(container.get("env", [])):
            name, path = each["name"], f"{subject}.env[{at}]"
            check(name not in seen, path, f"{name} is set twice")
            seen.add(name)
            check(("value" in each) != ("valueFrom" in each), path, "must have one of value and valueFrom")
            reserved = name.startswith("PET_") or name in _OWN_RANKS or (kind != "Job" and name in _NODES)
            check(not reserved, path, f"{name} is set by the operator, or by the job for its ranks", "remove it")
            _check_literal(each, path, check)
        check(Env.CHECKPOINT_DIR in seen, f"{subject}.env", f"{Env.CHECKPOINT_DIR} is missing")


def _check_literal(variable: Node, path: str, check: _Found) -> None:
    value = variable.get("value", "")
    secret = SecretMask({variable["name"]: value}).text(value) != value
    fix = "valueFrom: {secretKeyRef: {name: SECRET, key: KEY}}"
    check(not secret, path, f"{variable['name']} looks like a secret, which has no place in a manifest", fix)


def _check_claims(pod: _Pod, documents: Sequence[Node], check: _Found) -> None:
    used = {
        each["persistentVolumeClaim"]["claimName"]
        for each in pod.spec.get("volumes", [])
        if "persistentVolumeClaim" in each
    }
    single = {
        each["metadata"]["name"]
        for each in documents
        if each["kind"] == "PersistentVolumeClaim" and not {*each["spec"]["accessModes"]} - {*SINGLE}
    }
    several = pod.count > 1 or pod.path.partition(".spec.pytorchReplicaSpecs.")[2].startswith("Worker")
    for name in sorted(used & single if several else set[str]()):
        rule = f"several nodes use the claim {name}, which one node alone can use"
        check(False, f"{pod.path}.volumes", rule, "accessModes: [ReadWriteMany]")


def _check_config(pod: _Pod, documents: Sequence[Node], check: _Found) -> None:
    maps = {each["metadata"]["name"] for each in documents if each["kind"] == "ConfigMap"}
    for at, each in enumerate(pod.spec.get("volumes", [])):
        name = each.get("configMap", {}).get("name")
        rule = f"there is no ConfigMap {name} beside it"
        check(name is None or name in maps, f"{pod.path}.volumes[{at}].configMap.name", rule)


def _check_texts(value: Any, path: str, check: _Found) -> None:
    """Texts that say themselves that they are keys, wherever they stand."""
    if isinstance(value, dict):
        for name, each in cast("Node", value).items():
            _check_texts(each, f"{path}.{name}", check)
    elif isinstance(value, list):
        for at, each in enumerate(cast("list[Any]", value)):
            _check_texts(each, f"{path}[{at}]", check)
    elif isinstance(value, str):
        check(SecretMask({}).text(value) == value, path, "holds a secret, which has no place in a manifest")
