"""The ``kubernetes`` block of ``job.yaml``, and its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from sft_job.config.secrets import SecretMask
from sft_job.errors import Problem
from sft_job.jobfile.mounts import check_path, parse_mount
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import MOST_SECONDS, Checks, is_set_by_launcher, seconds_of, text_problems

KINDS = ("pytorchjob", "trainjob", "job")
"""What starts the pods: Kubeflow's training operator, Kubeflow Trainer 2, or Kubernetes alone."""
LEAVE_SECONDS = 15
"""Between the end of the job's own grace and the kill: for the nodes to agree and to leave."""
SHORTEST_START = 300
"""Seconds that a time limit must leave to a start."""
SHARED = ("ReadWriteMany",)
SINGLE = ("ReadWriteOnce", "ReadWriteOncePod")
"""Access modes of a claim in which several nodes can write, and in which one can."""
SCRATCH = "/tmp"
SHM = "/dev/shm"
CONFIG_FOLDER = "/etc/sft_job"
"""Folders of the container that the manifest makes."""
LONGEST_NAME = 40
"""So that NAME-worker-999 and NAME-node-0-999-abcde are names of hosts."""
_MOST_NODES = 1000
_MOST_GIB = 2**30  # an EiB
TOLERATION = re.compile(
    r"(?P<key>[A-Za-z0-9][A-Za-z0-9./_-]*)(=(?P<value>[A-Za-z0-9._-]*))?"
    r"(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?(:(?P<seconds>[0-9]{1,9}))?"
)
"""``key``, ``key=value``, ``key:EFFECT``, ``key=value:NoExecute:SECONDS``."""
_LABEL_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_SECRET = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9._-]{1,253}")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_CONFINEMENT = ("container.apparmor.security.", "seccomp.security.alpha.", "container.seccomp.security.alpha.")
_OWN_LABELS = (
    "trainer.kubeflow.org/",
    "app.kubernetes.io/",
    "batch.kubernetes.io/",
    "jobset.sigs.k8s.io/",
    "training.kubeflow.org/",
)


@dataclass
class KubernetesSettings:
    """What starts the pods, and what they get from the cluster."""

    kind: str = "pytorchjob"
    """pytorchjob (Kubeflow's training operator), trainjob (Kubeflow Trainer 2) or job (needs no operator)."""
    context: str | None = None
    """Context of kubectl; null = its present one."""
    namespace: str | None = None
    """Namespace; null = that of kubectl's context."""
    checkpoint_claim: str | None = None
    """PersistentVolumeClaim that is mounted at ``checkpoint_dir``."""
    checkpoint_access: str = "ReadWriteMany"
    """Its access mode; with several nodes it must be ReadWriteMany."""
    checkpoint_size_gib: float | None = None
    """Size with which the claim is made together with the job; null = it is there already."""
    storage_class: str | None = None
    """Storage class of a claim that is made; null = the cluster's default."""
    claims: list[str] = field(default_factory=list[str])
    """Other claims, each ``NAME:/path`` (read-only) or ``NAME:/path:rw``."""
    secrets: dict[str, str] = field(default_factory=dict[str, str])
    """Variable -> ``SECRET/KEY``: a key of a Secret that is in the namespace already. Never the value."""
    image_pull_secrets: list[str] = field(default_factory=list[str])
    """Secrets with which the image is pulled."""
    image_pull_policy: str = "IfNotPresent"
    """Always, IfNotPresent or Never."""
    service_account: str | None = None
    """Service account of the pods; its token is not mounted."""
    priority_class: str | None = None
    """Priority class of the pods."""
    runtime_class: str | None = None
    """Runtime class of the pods, such as ``nvidia``."""
    node_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels that a node must have."""
    tolerations: list[str] = field(default_factory=list[str])
    """Taints that do not matter: ``key``, ``key=value``, ``key:NoSchedule``, ``key=value:NoExecute:300``."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called."""
    resources: dict[str, str] = field(default_factory=dict[str, str])
    """Other resources of each pod: ``{rdma/ib: 1, ephemeral-storage: 50Gi}``."""
    scratch_gib: float = 20.0
    """Most that may lie in ``/tmp``, the one folder of the node that the pod writes; the root is read-only."""
    user: int = 10001
    """User id of the process; any but root."""
    group: int = 10001
    """Group id of the process, and of the files on its claims (``fsGroup``)."""
    queue: str | None = None
    """Kueue's LocalQueue; the job is made suspended, and Kueue lets it start."""
    suspend: bool = False
    """Make the job suspended."""
    ttl_seconds: int | None = None
    """Remove the job so long after its end; null = never."""
    labels: dict[str, str] = field(default_factory=dict[str, str])
    """More labels of the job and its pods."""
    annotations: dict[str, str] = field(default_factory=dict[str, str])
    """Annotations of the job and its pods."""
    master_port: int = 23456
    """Port at which the ranks meet; a TrainJob has 29500."""


@dataclass(frozen=True)
class Claim:
    """One claim in the container.

    Attributes:
        name: of the PersistentVolumeClaim.
        path: where the container sees it.
        writable: the job may write there.
    """

    name: str
    path: str
    writable: bool


def parse_claim(text: str) -> Claim:
    """Read one entry of ``kubernetes.claims``.

    Raises:
        ValueError: it has another form; the message is the rule.
    """
    name, _, rest = text.partition(":")
    if not _SUBDOMAIN.fullmatch(name) or not rest:
        raise ValueError("must be CLAIM:/path, with :ro (the default) or :rw behind it")
    path, colon, mode = rest.partition(":")
    if not path.startswith("/") or (colon and mode not in ("ro", "rw")):
        raise ValueError("must be CLAIM:/path, with :ro (the default) or :rw behind it")
    check_path(path)
    return Claim(name, str(PurePosixPath(path)), mode == "rw")


def wall_seconds(job: JobFile, limit: int) -> int:
    """``trainer.max_wall_seconds`` of a start with this time limit: the pod's own deadline stays behind it."""
    return limit - job.grace_seconds - LEAVE_SECONDS


def is_data_key(text: str) -> bool:
    """Whether a ConfigMap can hold a file of this name."""
    return bool(re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text)) and text != "." and not text.startswith("..")


def undoes_confinement(key: str) -> bool:
    """Whether an annotation of this name sets a profile in place of the pod's own."""
    return key.partition("/")[0].startswith(_CONFINEMENT)


def is_secret_note(key: str, value: str) -> bool:
    """Whether a label or annotation holds a secret, as its name or its value says."""
    name = re.sub(r"[^A-Za-z0-9]", "_", key.rpartition("/")[2])
    return SecretMask({name: value}).text(value) != value


def is_name(text: str) -> bool:
    """Whether a job of this name can have pods and a service."""
    return bool(_LABEL_1035.fullmatch(text)) and len(text) <= LONGEST_NAME


def check_kubernetes(job: JobFile, block: KubernetesSettings) -> list[Problem]:
    """Everything that is wrong with the block, alone and with the rest of the job file."""
    problems = text_problems(block, "kubernetes", frozenset())
    check = Checks(problems)
    check(block.kind in KINDS, "kubernetes.kind", f"must be one of {', '.join(KINDS)}", value=block.kind)
    rule = f"must begin with a small letter and go on with small letters, digits and -, at most {LONGEST_NAME}"
    fix = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:LONGEST_NAME].strip("-")
    check(is_name(job.name), "name", rule, f"name: {fix if is_name(fix) else 'sft'}", job.name)
    check(job.image, "image", "a pod needs an image", "image: registry.example.com/team/sft-job:1.0")
    _check_names(block, check)
    _check_folders(job, block, check)
    _check_secrets(job, block, check)
    _check_numbers(job, block, check)
    for at, each in enumerate(block.tolerations):
        rule = "must be key, key=value, key:EFFECT or key=value:NoExecute:SECONDS"
        found = TOLERATION.fullmatch(each)
        check(found, f"kubernetes.tolerations[{at}]", rule, value=each)
        late = found is not None and found["seconds"] is not None and found["effect"] != "NoExecute"
        check(not late, f"kubernetes.tolerations[{at}]", "seconds go with NoExecute alone", value=each)
    return problems


def _check_names(block: KubernetesSettings, check: Checks) -> None:
    rule = "must be small letters, digits, - and ."
    for name in ("checkpoint_claim", "storage_class", "service_account", "priority_class", "runtime_class", "queue"):
        value = getattr(block, name)
        check(value is None or _SUBDOMAIN.fullmatch(value), f"kubernetes.{name}", rule, value=value)
    space = block.namespace
    good = space is None or (re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", space) and len(space) <= 63)
    check(good, "kubernetes.namespace", "must be small letters, digits and -, at most 63", value=space)
    context = block.context
    good = context is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+=-]{0,252}", context)
    check(good, "kubernetes.context", "must be letters, digits and . _ : / @ + = -", value=context)
    for at, each in enumerate(block.image_pull_secrets):
        check(_SUBDOMAIN.fullmatch(each), f"kubernetes.image_pull_secrets[{at}]", rule, value=each)
    policies = ("Always", "IfNotPresent", "Never")
    policy = block.image_pull_policy
    check(policy in policies, "kubernetes.image_pull_policy", f"must be one of {', '.join(policies)}", value=policy)
    for name in ("node_selector", "labels", "annotations"):
        for key, value in getattr(block, name).items():
            subject = f"kubernetes.{name}.{key}"
            check(_KEY.fullmatch(key), subject, "must be a label's name: letters, digits, . _ - and a prefix with /")
            good = name == "annotations" or _VALUE.fullmatch(value)
            check(good, subject, "must be letters, digits, . _ and -, at most 63", value=value)
            rule = "Pod Security 'restricted' does not let an annotation set the profile"
            check(name != "annotations" or not undoes_confinement(key), subject, rule, "remove it")
            # The value is not shown.
            rule = "looks like a secret, which everybody who may read the job would see"
            check(name == "node_selector" or not is_secret_note(key, value), subject, rule, "kubernetes.secrets")
            taken = name == "labels" and (key.startswith(_OWN_LABELS) or key == "kueue.x-k8s.io/queue-name")
            check(not taken, subject, "is set by the launcher or by Kubernetes", "remove it, or set kubernetes.queue")
    for key, value in {block.gpu_resource: "1", **block.resources}.items():
        subject = f"kubernetes.resources.{key}"
        check(_KEY.fullmatch(key), subject, "must be the name of a resource")
        check(
            _QUANTITY.fullmatch(value) and len(value) <= 15,
            subject,
            "must be a quantity, such as 1 or 50Gi",
            value=value,
        )
        fix = "set resources of the job file, which every launcher reads"
        check(key not in ("cpu", "memory"), subject, "has a setting of its own", fix)


def _check_folders(job: JobFile, block: KubernetesSettings, check: Checks) -> None:
    check(block.checkpoint_claim, "kubernetes.checkpoint_claim", "must name the claim that holds the run folder")
    modes = (*SHARED, *SINGLE)
    access = block.checkpoint_access
    check(access in modes, "kubernetes.checkpoint_access", f"must be one of {', '.join(modes)}", value=access)
    nodes = job.resources.nodes
    rule = f"{nodes} nodes write the run folder, and one node alone can write such a claim"
    fix = "a claim with ReadWriteMany (NFS, CephFS, Lustre, Filestore, EFS, Azure Files), or one node"
    check(nodes == 1 or access not in SINGLE, "kubernetes.checkpoint_access", rule, fix, access)
    taken: dict[str, str] = {SCRATCH: "/tmp", SHM: "/dev/shm", CONFIG_FOLDER: "the run's config"}
    try:
        if not job.checkpoint_dir.startswith("/"):
            raise ValueError("must be an absolute path in the container: the claim is mounted there")
        check_path(job.checkpoint_dir)
        path = str(PurePosixPath(job.checkpoint_dir))
        check(path not in taken and path != "/", "checkpoint_dir", "is another folder of the pod", "/runs", path)
        taken[path] = "checkpoint_dir"
    except ValueError as error:
        check(False, "checkpoint_dir", str(error), "checkpoint_dir: /runs/one", job.checkpoint_dir)
    paths = set(taken)
    for at, each in enumerate(block.claims):
        subject = f"kubernetes.claims[{at}]"
        try:
            claim = parse_claim(each)
        except ValueError as error:
            check(False, subject, str(error), value=each)
            continue
        rule = f"{claim.path} is {taken.get(claim.path, 'the root folder')}"
        check(claim.path not in taken and claim.path != "/", subject, rule, "another path", each)
        taken[claim.path] = subject
        paths.add(claim.path)
    for at, each in enumerate(job.mounts):
        try:
            target = PurePosixPath(parse_mount(each).target)
        except ValueError:
            continue  # said by the job file's own rules
        held = any(target.is_relative_to(path) for path in paths)
        rule = f"a pod sees no folder of its node, and no claim is mounted at {target} or above it"
        check(held, f"mounts[{at}]", rule, f"kubernetes.claims: [CLAIM:{target}]", each)


def _check_secrets(job: JobFile, block: KubernetesSettings, check: Checks) -> None:
    for name, reference in block.secrets.items():
        subject = f"kubernetes.secrets.{name}"
        check(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name), subject, "a variable's name is letters, digits and _")
        good = _SECRET.fullmatch(reference) and SecretMask({}).text(reference) == reference
        # The value is not shown: it may be the secret itself.
        fix = f"kubectl create secret generic NAME --from-file=KEY=FILE, then {name}: NAME/KEY"
        check(
            good, subject, "must be SECRET/KEY, the names of a Secret and of a key in it; never a secret's value", fix
        )
        both = name in job.environment
        check(not both, subject, "environment sets this variable too", "keep one of the two")
        check(not is_set_by_launcher(name), subject, "the launcher sets this variable itself", "remove it")
    for at, name in enumerate(job.secrets):
        rule = "a pod gets secrets from Secrets of its namespace, and none is named for this variable"
        check(name in block.secrets, f"secrets[{at}]", rule, f"kubernetes.secrets: {{{name}: SECRET/KEY}}", name)


def _check_numbers(job: JobFile, block: KubernetesSettings, check: Checks) -> None:
    memory = job.resources.memory_gib
    rule = "must be set, and more than 0: a pod without a limit is the first that a full node kills"
    check(memory, "resources.memory_gib", rule, "memory_gib: 64 (/dev/shm comes on top of it)", memory)
    shared = job.resources.shm_gib
    rule = "must be more than 0: without it /dev/shm has 64 MB, too little for NCCL and for loading data"
    check(shared > 0, "resources.shm_gib", rule, "shm_gib: 16", shared)
    check.within(1, _MOST_NODES, "resources.nodes", job.resources.nodes)
    check(block.user != 0, "kubernetes.user", "must not be root", "user: 10001", block.user)
    check.within(0, MOST_SECONDS, "kubernetes.user", block.user)
    check.within(0, MOST_SECONDS, "kubernetes.group", block.group)
    for name in ("scratch_gib", "checkpoint_size_gib"):
        size = getattr(block, name)
        rule = f"must be more than 0, and at most {_MOST_GIB}"
        check(size is None or 0 < size <= _MOST_GIB, f"kubernetes.{name}", rule, value=size)
    check(1024 <= block.master_port <= 65535, "kubernetes.master_port", "must be from 1024 to 65535")
    check.within(0, MOST_SECONDS, "kubernetes.ttl_seconds", block.ttl_seconds)
    rule = f"must be at most {MOST_SECONDS - LEAVE_SECONDS}"
    check(job.grace_seconds <= MOST_SECONDS - LEAVE_SECONDS, "grace_seconds", rule, value=job.grace_seconds)
    rule = "Trainer makes a TrainJob's pods again when their JobSet is removed, and the run with them"
    endless = block.kind == "trainjob" and block.ttl_seconds is not None
    check(not endless, "kubernetes.ttl_seconds", rule, "leave it out for kind trainjob", block.ttl_seconds)
    for name in ("timeouts", "preemptions"):
        rule = "Kubernetes cannot count these by themselves: they are started again as often as it takes"
        fix = f"retries.{name}=null; starts that come no further end with 86 all the same"
        value = getattr(job.retries, name)
        check(value is None, f"retries.{name}", rule, fix, value)
    seconds = seconds_of(job.resources.time or "")
    if seconds is None or seconds <= job.grace_seconds:
        return  # said by the job file's own rules
    left = wall_seconds(job, seconds)
    rule = (
        f"leaves {left} s for each start, less grace_seconds and {LEAVE_SECONDS} s to leave; {SHORTEST_START} or more "
        "are needed: pulling the image and loading the model happen in them"
    )
    check(left >= SHORTEST_START, "resources.time", rule, "a longer time, or smaller grace_seconds", job.resources.time)
