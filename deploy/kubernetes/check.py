"""What is wrong with manifests, found without a cluster: before every submission, and on what people edited by hand.

Besides the fields and their types (``shape``): what an API server lets through although the job would not work, and an
operator's webhook may or may not refuse; Pod Security's ``restricted``; secrets that stand in clear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from deploy.kubernetes.failure_rules import check_failure_rules
from deploy.kubernetes.pod_rules import NODES, OWN_RANKS, Found, Pod, check_literal, check_pod
from deploy.kubernetes.pods import QUEUE, Node
from deploy.kubernetes.render import COMPLETION_INDEX
from deploy.kubernetes.settings import is_data_key, is_name, is_secret_note, undoes_confinement
from deploy.kubernetes.shape import shape_problems
from sft_job.config.secrets import SecretMask
from sft_job.contract import Env
from sft_job.errors import Problem


def check_manifests(documents: Sequence[Any]) -> list[Problem]:
    """Everything that is wrong with the objects of one job.

    Args:
        documents: of one or several files, as YAML gave them.
    """
    given = [each for each in documents if each is not None]
    problems = [found for each in given for found in shape_problems(each, _subject(each))]
    if problems:
        return problems  # the rules below read fields that must be there
    found = Found()
    for each in cast("list[Node]", given):
        _check_document(each, given, found)
    return found.problems


def _subject(document: Any) -> str:
    if not isinstance(document, dict):
        return "document"
    about = cast("Node", document).get("metadata")
    name = cast("Node", about).get("name", "") if isinstance(about, dict) else ""
    return f"{cast('Node', document).get('kind', 'document')} {name}".strip()


def _check_document(document: Node, documents: Sequence[Node], check: Found) -> None:
    subject, kind = _subject(document), document["kind"]
    _check_texts(document, subject, check)
    for name in document["data"] if kind == "ConfigMap" else ():
        check(
            is_data_key(name),
            f"{subject}.data.{name}",
            "must be letters, digits, '.', '_' and '-', and not begin with ..",
        )
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
    for pod in _pods(document, documents, subject):
        check_pod(pod, kind, documents, check)


def _pods(document: Node, documents: Sequence[Node], subject: str) -> Iterator[Pod]:
    spec, kind = document.get("spec", {}), document["kind"]
    if kind == "PyTorchJob":
        for role, replica in spec["pytorchReplicaSpecs"].items():
            path = f"{subject}.spec.pytorchReplicaSpecs.{role}.template"
            nodes = sum(each["replicas"] for each in spec["pytorchReplicaSpecs"].values())
            yield _pod(path, replica["template"], "pytorch", nodes, spec["nprocPerNode"])
    elif kind == "TrainingRuntime":
        jobs = (each["spec"]["trainer"] for each in documents if each["kind"] == "TrainJob")
        ranks = next((str(each["numProcPerNode"]) for each in jobs), "")
        for at, each in enumerate(spec["template"]["spec"]["replicatedJobs"]):
            path = f"{subject}.spec.template.spec.replicatedJobs[{at}].template.spec.template"
            yield _pod(path, each["template"]["spec"]["template"], "node", spec["mlPolicy"]["numNodes"], ranks)
    elif kind == "Job":
        yield _pod(f"{subject}.spec.template", spec["template"], "", spec.get("completions", 1))


def _pod(path: str, template: Node, container: str, nodes: int, ranks: str = "") -> Pod:
    return Pod(f"{path}.spec", template["spec"], container, nodes, ranks)


def _check_pytorch_job(document: Node, subject: str, check: Found) -> None:
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


def _check_train_job(document: Node, documents: Sequence[Node], subject: str, check: Found) -> None:
    spec = document["spec"]
    ref = spec["runtimeRef"]
    if ref["kind"] == "TrainingRuntime":
        there = any(each["kind"] == "TrainingRuntime" and each["metadata"]["name"] == ref["name"] for each in documents)
        rule = f"there is no TrainingRuntime {ref['name']} beside it"
        check(there, f"{subject}.spec.runtimeRef.name", rule)
        for each in documents:
            if (each["kind"], each["metadata"]["name"]) == ("TrainingRuntime", ref["name"]):
                nodes = each["spec"]["mlPolicy"]["numNodes"]
                rule = f"must be the runtime's mlPolicy.numNodes, {nodes}"
                check(spec["trainer"]["numNodes"] == nodes, f"{subject}.spec.trainer.numNodes", rule)
    for name in ("numNodes", "numProcPerNode"):
        check(spec["trainer"][name] > 0, f"{subject}.spec.trainer.{name}", "must be 1 or more")
    for at, each in enumerate(spec["trainer"].get("env", [])):
        rule = "Trainer sets these variables itself"
        path = f"{subject}.spec.trainer.env[{at}].name"
        check(not each["name"].startswith("PET_") and each["name"] not in (*OWN_RANKS, *NODES), path, rule)
        check_literal(each, path, check)


def _check_runtime(document: Node, subject: str, check: Found) -> None:
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
        check_failure_rules(each["template"]["spec"], job, check)
        rule = "Trainer would make the JobSet again, and the run with it"
        check("ttlSecondsAfterFinished" not in each["template"]["spec"], f"{job}.ttlSecondsAfterFinished", rule)
        rule = "is for a Job that stands alone; Trainer sets the pods, all of which must end with 0"
        check("successPolicy" not in each["template"]["spec"], f"{job}.successPolicy", rule)


def _check_job(document: Node, documents: Sequence[Node], subject: str, check: Found) -> None:
    spec = document["spec"]
    path = f"{subject}.spec"
    nodes = spec.get("completions", 1)
    check(spec.get("completionMode") == "Indexed", f"{path}.completionMode", "pods need an index: Indexed")
    same = nodes == spec.get("parallelism", 1) and nodes > 0
    check(same, f"{path}.parallelism", "all nodes must run at once: as many as completions")
    check_failure_rules(spec, path, check)
    done = spec.get("successPolicy")
    good = done is None or [each.get("succeededIndexes") for each in done["rules"]] == ["0"]
    check(good, f"{path}.successPolicy", "the run is done when node 0 says so", 'rules: [{succeededIndexes: "0"}]')
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


def _check_texts(value: Any, path: str, check: Found) -> None:
    """Texts that say themselves that they are keys, wherever they stand."""
    if isinstance(value, dict):
        for name, each in cast("Node", value).items():
            if name in ("annotations", "labels"):
                _check_notes(each, f"{path}.{name}", check)
            _check_texts(each, f"{path}.{name}", check)
    elif isinstance(value, list):
        for at, each in enumerate(cast("list[Any]", value)):
            _check_texts(each, f"{path}[{at}]", check)
    elif isinstance(value, str):
        check(SecretMask({}).text(value) == value, path, "holds a secret, which has no place in a manifest")


def _check_notes(notes: Any, path: str, check: Found) -> None:
    """Labels and annotations: no secrets, and nothing that takes back what the pod's security context says."""
    for key, value in cast("Node", notes).items() if isinstance(notes, dict) else ():
        rule = "Pod Security 'restricted' does not let an annotation set the profile"
        check(not undoes_confinement(key), f"{path}.{key}", rule, "remove it; securityContext says it")
        secret = is_secret_note(key, value)
        check(not secret, f"{path}.{key}", "looks like a secret, which everybody who may read the job would see")
