"""Rules for one pod of a manifest: what it may do, what it gets, and what it is told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

from deploy.kubernetes.pods import Node
from deploy.kubernetes.settings import LEAVE_SECONDS, SCRATCH, SHM, SINGLE
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
OWN_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that the job sets for its ranks."""
NODES = (Env.NNODES, Env.NODE_RANK, Env.MASTER_ADDR, Env.MASTER_PORT)
"""Variables that say where a node stands in the run."""


class Found:
    """Collects problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, holds: object, subject: str, rule: str, fix: str = "") -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix))


@dataclass(frozen=True)
class Pod:
    """A pod template of a document.

    Attributes:
        path: where it stands.
        spec: its specification.
        container: name that its container must have; '' = any.
        nodes: of the job.
        ranks: on each node, as its operator is told; '' = no operator.
    """

    path: str
    spec: Node
    container: str
    nodes: int
    ranks: str = ""

    def containers(self) -> Iterator[tuple[str, Node]]:
        """Where each stands, and the container."""
        for at, each in enumerate(self.spec["containers"]):
            yield f"{self.path}.containers[{at}]", each


def check_pod(pod: Pod, kind: str, documents: Sequence[Node], check: Found) -> None:
    """All rules for one pod.

    Args:
        pod: its template.
        kind: of the document in which it stands.
        documents: all that belong to the job.
        check: takes the problems.
    """
    _check_spec(pod, check)
    _check_variables(pod, kind, check)
    _check_mounts(pod, documents, check)
    _check_claims(pod, documents, check)
    _check_config(pod, documents, check)


def _check_spec(pod: Pod, check: Found) -> None:
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


def _check_security(pod: Node, container: Node, path: str, subject: str, check: Found) -> None:
    """Pod Security's ``restricted``, and a root that cannot be written."""
    level = "Pod Security 'restricted' wants it"
    both = {**pod, **container}
    check(both.get("runAsNonRoot") is True, f"{path}.securityContext.runAsNonRoot", level, "true")
    check(both.get("runAsUser", 0) > 0, f"{path}.securityContext.runAsUser", f"must be set, and not root: {level}")
    profile = both.get("seccompProfile", {}).get("type")
    check(profile is not None, f"{path}.securityContext.seccompProfile", level, "type: RuntimeDefault")
    for where, context in ((f"{path}.securityContext", pod), (f"{subject}.securityContext", container)):
        given = context.get("seccompProfile", {})
        named = (given.get("type") == "Localhost") == bool(given.get("localhostProfile"))
        check(named, f"{where}.seccompProfile", "localhostProfile goes with the type Localhost, and it with that")
    where = f"{subject}.securityContext"
    escalation = container.get("allowPrivilegeEscalation") is False
    check(escalation, f"{where}.allowPrivilegeEscalation", level, "false")
    check("ALL" in container.get("capabilities", {}).get("drop", []), f"{where}.capabilities.drop", level, "[ALL]")
    check(container.get("readOnlyRootFilesystem") is True, f"{where}.readOnlyRootFilesystem", "must be true")


def _check_memory(pod: Pod, check: Found) -> None:
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


def _check_variables(pod: Pod, kind: str, check: Found) -> None:
    for subject, container in pod.containers():
        seen: set[str] = set()
        for at, each in enumerate(container.get("env", [])):
            name, path = each["name"], f"{subject}.env[{at}]"
            check(name not in seen, path, f"{name} is set twice")
            seen.add(name)
            check(("value" in each) != ("valueFrom" in each), path, "must have one of value and valueFrom")
            # Beside an operator's own PET_NNODES, with which the job compares it.
            same = name == Env.NNODES and each.get("value") == str(pod.nodes)
            reserved = name.startswith("PET_") or name in OWN_RANKS or (kind != "Job" and name in NODES and not same)
            check(not reserved, path, f"{name} is set by the operator, or by the job for its ranks", "remove it")
            check_literal(each, path, check)
        check(Env.CHECKPOINT_DIR in seen, f"{subject}.env", f"{Env.CHECKPOINT_DIR} is missing")
        values = {each["name"]: each.get("value", "") for each in container.get("env", [])}
        ranks = values.get(Env.NPROC_PER_NODE, pod.ranks)
        differ = pod.ranks.isdecimal() and ranks.isdecimal() and pod.ranks != ranks
        check(not differ, f"{subject}.env", f"{Env.NPROC_PER_NODE} is {ranks}, and the operator is told {pod.ranks}")


def _check_mounts(pod: Pod, documents: Sequence[Node], check: Found) -> None:
    """No place twice, and a place to write for the job's files and for its caches."""
    volumes = {each["name"]: each for each in pod.spec.get("volumes", [])}
    only_read = {
        each["metadata"]["name"]
        for each in documents
        if each["kind"] == "PersistentVolumeClaim" and {*each["spec"]["accessModes"]} <= {"ReadOnlyMany"}
    }
    for subject, container in pod.containers():
        mounts: dict[PurePosixPath, Node] = {}
        for at, each in enumerate(container.get("volumeMounts", [])):
            place = PurePosixPath(each["mountPath"])
            check(place not in mounts, f"{subject}.volumeMounts[{at}].mountPath", f"{place} is mounted twice")
            mounts[place] = each
        scratch = mounts.get(PurePosixPath(SCRATCH), {})
        good = "emptyDir" in volumes.get(scratch.get("name", ""), {}) and not scratch.get("readOnly")
        rule = f"the root cannot be written, so the job needs an emptyDir at {SCRATCH}"
        check(good, f"{subject}.volumeMounts", rule, "{name: scratch, mountPath: " + SCRATCH + "}")
        values = {each["name"]: each.get("value", "") for each in container.get("env", [])}
        folder = PurePosixPath(values.get(Env.CHECKPOINT_DIR, ""))
        above = [place for place in mounts if folder.is_relative_to(place)]
        mount = mounts[max(above, key=lambda place: len(place.parts))] if above else {}
        volume = volumes.get(mount.get("name", ""), {})
        rule = f"no claim is mounted at {Env.CHECKPOINT_DIR}: what the run saves would be lost with the pod"
        check("persistentVolumeClaim" in volume, f"{subject}.volumeMounts", rule)
        claim: Node = volume.get("persistentVolumeClaim", {})
        read = mount.get("readOnly") or claim.get("readOnly") or claim.get("claimName") in only_read
        check(
            not read,
            f"{subject}.volumeMounts",
            f"the claim at {Env.CHECKPOINT_DIR} is read-only, and the run saves there",
        )


def check_literal(variable: Node, path: str, check: Found) -> None:
    """Refuse a variable whose value is a secret."""
    value = variable.get("value", "")
    secret = SecretMask({variable["name"]: value}).text(value) != value
    fix = "valueFrom: {secretKeyRef: {name: SECRET, key: KEY}}"
    check(not secret, path, f"{variable['name']} looks like a secret, which has no place in a manifest", fix)


def _check_claims(pod: Pod, documents: Sequence[Node], check: Found) -> None:
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
    for name in sorted(used & single if pod.nodes > 1 else set[str]()):
        rule = f"several nodes use the claim {name}, which one node alone can use"
        check(False, f"{pod.path}.volumes", rule, "accessModes: [ReadWriteMany]")


def _check_config(pod: Pod, documents: Sequence[Node], check: Found) -> None:
    maps = {each["metadata"]["name"] for each in documents if each["kind"] == "ConfigMap"}
    for at, each in enumerate(pod.spec.get("volumes", [])):
        name = each.get("configMap", {}).get("name")
        rule = f"there is no ConfigMap {name} beside it"
        check(name is None or name in maps, f"{pod.path}.volumes[{at}].configMap.name", rule)
