"""``sft-job submit kubernetes``: load, check, render, check what was rendered, apply. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import yaml

from deploy.kubernetes.check import check_manifests
from deploy.kubernetes.kubectl import Kubectl
from deploy.kubernetes.pods import Node, Task, job_id, own_labels, suspended
from deploy.kubernetes.render import KINDS, render, to_yaml
from deploy.kubernetes.settings import SINGLE, KubernetesSettings, check_kubernetes, is_data_key, parse_claim
from sft_job.config.secrets import SecretMask
from sft_job.contract import DEFAULT_CONFIG_NAME, Env, ExitCode
from sft_job.errors import JobError, Problem, raise_problems
from sft_job.jobfile.load import LoadedJob, load_job
from sft_job.jobfile.mounts import Mount, absolute
from sft_job.jobfile.run import Place, look_from_here
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.seen import Sight
from sft_job.submissions import remember

_MOST_BYTES = 900_000
"""A ConfigMap holds 1 MiB in all."""
Show = Callable[[str], None]


def submit_job(
    path: Path,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    show: Show,
    *,
    kind: str | None = None,
    dry_run: bool = False,
) -> int:
    """Submit a job file to Kubernetes; the exit code of the command.

    Args:
        path: the job file.
        overrides: ``key=value`` on top of it, or on top of the run's config.
        environ: environment of the process.
        show: takes lines for the user.
        kind: in place of ``kubernetes.kind``.
        dry_run: only show the manifests, as YAML; notes stand in comments.

    Raises:
        JobError: what is wrong with the job file, or why the cluster did not take it (2).
    """
    more = [] if kind is None else [f"kubernetes.kind={kind}"]
    loaded = load_job(path, [*overrides, *more], "kubernetes", KubernetesSettings, check_kubernetes)
    task, notes = make_task(loaded, environ, Path.cwd())
    objects = render(task)
    manifest = to_yaml(objects)
    # What the cluster will read, not what we wrote: YAML has its own ideas of some texts.
    raise_problems(check_manifests(list(yaml.safe_load_all(manifest))))
    notes += _uncounted(task)
    if dry_run:
        show("".join(f"# {note}\n" for note in notes) + manifest)
        return ExitCode.DONE
    for note in notes:
        show(note)
    kubectl = Kubectl(task.block.context, task.block.namespace)
    _look_at_cluster(kubectl, loaded, task)
    for line in kubectl.apply(manifest):
        show(line)
    _remember(kubectl, task, environ, show)
    return ExitCode.DONE


def make_task(loaded: LoadedJob[KubernetesSettings], environ: Mapping[str, str], cwd: Path) -> tuple[Task, list[str]]:
    """What is to be rendered, with the run's YAML as it is now, and what only the pods can tell.

    Raises:
        ProblemsError: what is wrong with the run's settings, or secrets that stand where they must not (2).
    """
    job, block = loaded.job, loaded.block
    config = Path(absolute(job.config, cwd))
    place = Place(
        "kubernetes",
        "pods",
        config,
        job.overrides,
        job_variables(job, block),
        gpu_count=job.resources.gpus_per_node,
        sight=Sight(_mounts(job, block), add="kubernetes.claims: [CLAIM:{}]", sources_here=False),
        secrets_here=False,
    )
    problems, notes = look_from_here(loaded, place, environ)
    text, more = _config_text(config, environ) if config.is_file() else ("", [])
    raise_problems([*problems, *more])
    name = config.name
    return Task(job, block, name if is_data_key(name) else DEFAULT_CONFIG_NAME, text), notes


def _mounts(job: JobFile, block: KubernetesSettings) -> list[Mount]:
    """The claims as the pods see them."""
    claims = [parse_claim(each) for each in block.claims]
    return [
        Mount(block.checkpoint_claim or "", os.path.normpath(job.checkpoint_dir), writable=True),
        *(Mount(each.name, each.path, each.writable) for each in claims),
    ]


def job_variables(job: JobFile, block: KubernetesSettings) -> dict[str, str]:
    """What ``sft-job train`` reads in the first pod, whoever sets it there."""
    nodes = job.resources.nodes
    places = {
        Env.NNODES: str(nodes),
        Env.NODE_RANK: "0",
        Env.MASTER_ADDR: f"{job.name}-0",
        Env.MASTER_PORT: str(block.master_port),
    }
    own = {Env.CHECKPOINT_DIR: job.checkpoint_dir, Env.NPROC_PER_NODE: str(job.ranks_per_node)}
    return {**job.environment, **own, **(places if nodes > 1 else {})}


def _config_text(config: Path, environ: Mapping[str, str]) -> tuple[str, list[Problem]]:
    try:
        content = config.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return "", [Problem(ExitCode.CONFIG, "config", f"cannot be read: {error}", value=str(config))]
    problems: list[Problem] = []
    if len(content) > _MOST_BYTES:
        rule = f"has {len(content)} bytes, and a ConfigMap holds at most {_MOST_BYTES}"
        problems.append(Problem(ExitCode.CONFIG, "config", rule, value=str(config)))
    if SecretMask(environ).text(text) != text:
        rule = "holds a secret, which everybody who may read ConfigMaps would see"
        fix = "let it read a variable, ${oc.env:NAME}, and name its Secret: kubernetes.secrets: {NAME: SECRET/KEY}"
        problems.append(Problem(ExitCode.CONFIG, "config", rule, fix, str(config)))
    return text, problems


def _uncounted(task: Task) -> list[str]:
    """Limits of the job file that nobody counts on Kubernetes, where the job's own breaker is what holds."""
    breaker = "starts that come no further end with 86"
    found = [f"not counted on Kubernetes: retries.without_checkpoint; {breaker}"]
    if task.block.kind == "pytorchjob" and task.job.retries.losses is not None:
        found.append(f"not counted by this operator after exit codes: retries.losses; {breaker}")
    return found


def _look_at_cluster(kubectl: Kubectl, loaded: LoadedJob[KubernetesSettings], task: Task) -> None:
    """Refuse a name that is taken, and claims that are not there or that the pods cannot share.

    Raises:
        JobError: so, or the cluster lacks what the kind needs, or does not answer (2).
    """
    kind, name = KINDS[task.block.kind], task.job.name
    try:
        taken = kubectl.exists(kind.resource, name)
    except JobError as error:
        if "doesn't have a resource type" not in str(error):
            raise
        fix = f"install {kind.needs}, or --kind job, which needs no operator"
        raise JobError(error.code, f"the cluster has no {kind.resource}\n    fix: {fix}") from error
    others = [each.resource for each in KINDS.values() if each is not kind]
    there = kind.resource if taken else next((each for each in others if _is_there(kubectl, each, name)), None)
    if there is not None:  # of another kind, too: pods and services would have one name
        rule = f"the cluster has a job of this name ({there})"
        remove = kubectl.line("delete", there, name)
        fix = f"another name; or {remove}, then submit again: the run goes on from its checkpoint"
        raise_problems([Problem(ExitCode.CONFIG, "name", rule, fix, name, loaded.origin("name"))])
    block = task.block
    written = {"kubernetes.checkpoint_claim"}
    wanted = {"kubernetes.checkpoint_claim": block.checkpoint_claim or ""}
    if block.checkpoint_size_gib is not None:
        wanted = {}
    for at, each in enumerate(block.claims):
        subject, given = f"kubernetes.claims[{at}]", parse_claim(each)
        wanted[subject] = given.name
        if given.writable:
            written.add(subject)
    found = kubectl.objects("persistentvolumeclaims", sorted(set(wanted.values()))) if wanted else {}
    problems = [] if found is None else _claim_problems(wanted, found, written, task.job.resources.nodes)
    raise_problems([dataclasses.replace(each, origin=loaded.origin(each.subject)) for each in problems])


def _is_there(kubectl: Kubectl, resource: str, name: str) -> bool:
    """Whether there is a job of another kind; not where the cluster does not know it, or we may not look."""
    try:
        return kubectl.exists(resource, name)
    except JobError:
        return False


def _claim_problems(
    wanted: Mapping[str, str], found: Mapping[str, Node], written: Set[str], nodes: int
) -> list[Problem]:
    problems: list[Problem] = []
    for subject, name in wanted.items():
        if name not in found:
            rule = "there is no such claim in this namespace"
            fix = "make it, or name another; kubernetes.checkpoint_size_gib makes that of the run folder"
            problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, name))
            continue
        modes = {*found[name].get("spec", {}).get("accessModes", [])}
        if modes and not modes - {"ReadOnlyMany"} and subject in written:
            rule = "the run writes there, and its access mode is ReadOnlyMany"
            problems.append(Problem(ExitCode.CONFIG, subject, rule, "a claim with ReadWriteMany", name))
        elif nodes > 1 and modes and not modes - {*SINGLE}:
            rule = f"{nodes} nodes use it, and its access mode is {', '.join(sorted(modes))}"
            problems.append(Problem(ExitCode.CONFIG, subject, rule, "a claim with ReadWriteMany, or one node", name))
    return problems


def _remember(kubectl: Kubectl, task: Task, environ: Mapping[str, str], show: Show) -> None:
    """Record the submission, and say what people do next."""
    job, kind = task.job, KINDS[task.block.kind]
    selector = ",".join(f"{label}={value}" for label, value in own_labels(task.block.kind, job.name).items())
    pod = kind.pod.format(name=job.name)
    log = [each.format(name=job.name, selector=selector) for each in kind.log]
    own_id = job_id(kubectl.namespace(), task.block.kind, job.name)
    ask = kubectl.line("exec", pod, "--", "sft-job", "status")
    run, place = Path(job.checkpoint_dir) / "sft", f"the claim {task.block.checkpoint_claim}"
    ranks = f"{job.resources.nodes} node(s), {job.ranks_per_node} rank(s) on each"
    show(f"submitted {task.block.kind} {job.name}: {ranks}")
    if task.block.queue is not None:
        show(f"it waits in Kueue's queue {task.block.queue}: {kubectl.line('get', 'workloads')}")
    elif suspended(task):
        show(f"it is suspended; start it: {_patch(kubectl, task, 'false')}")
    show(f"log: {kubectl.line('logs', '--follow', *log)}")
    for line in remember("kubernetes", own_id, run, environ=environ, ask=ask, place=place):
        show(line)
    if task.block.queue is None:
        show(f"stop it for a while (it saves first): {_patch(kubectl, task, 'true')}")
    kinds = ",".join((kind.resource, "configmaps", *kind.beside))
    show(f"stop it for good (it saves first): {kubectl.line('delete', kinds, f'--selector={selector}')}")


def _patch(kubectl: Kubectl, task: Task, value: str) -> str:
    kind = KINDS[task.block.kind]
    patch = f"--patch={kind.suspend.format(value)}"
    return kubectl.line("patch", kind.resource, task.job.name, "--type=merge", patch)
