from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.kubernetes.check import check_manifests
from deploy.kubernetes.pods import Task, gibibytes, plain
from deploy.kubernetes.render import KINDS, PERMANENT, render, to_yaml
from deploy.kubernetes.settings import KubernetesSettings, check_kubernetes
from sft_job.config.topology import read_topology
from sft_job.jobfile.schema import JobFile, Resources, Retries
from sft_job.jobfile.validate import validate
from tests.unit.deploy.kubernetes.mutations import REPOSITORY, good, loaded

GOLDEN = REPOSITORY / "tests" / "golden" / "kubernetes"
WHOLE: dict[str, Any] = {
    "namespace": "team",
    "checkpoint_claim": "runs",
    "checkpoint_access": "ReadWriteMany",
    "checkpoint_size_gib": 0.5,
    "storage_class": "nfs",
    "claims": ["data:/data", "scratch:/more:rw", "runs:/runs/old"],
    "secrets": {"WANDB_API_KEY": "wandb/api-key", "HF_TOKEN": "hub/token"},
    "image_pull_secrets": ["registry"],
    "image_pull_policy": "Always",
    "service_account": "trainer",
    "priority_class": "low",
    "runtime_class": "nvidia",
    "node_selector": {"gpu": "h100"},
    "tolerations": ["gpu", "team=a:NoSchedule", "spot:NoExecute:300"],
    "resources": {"rdma/ib": "1"},
    "user": 1234,
    "group": 0,
    "queue": "team-queue",
    "labels": {"team": "graphs"},
    "annotations": {"note": "one two"},
}


def task(kind: str, **more: Any) -> Task:
    """A job with every setting."""
    job = JobFile(
        name="graph-sft",
        config="sft.yaml",
        overrides=["optim.lr=2e-5", "trainer.project_name=$(HOME) and more"],
        image="registry.example.com/team/sft-job:1.0",
        checkpoint_dir="/runs",
        environment={"NCCL_DEBUG": "WARN", "HOME": "/more/home", "ODD": "yes"},
        secrets=["WANDB_API_KEY"],
        resources=Resources(nodes=3, gpus_per_node=4, cpus_per_node=16, memory_gib=100, shm_gib=8, time="4:00:00"),
        grace_seconds=200,
        retries=Retries(losses=5),
        preflight=True,
    )
    for name, value in more.pop("job", {}).items():
        setattr(job, name, value)
    block = KubernetesSettings(kind=kind, **{**WHOLE, "ttl_seconds": None if kind == "trainjob" else 3600, **more})
    assert [*validate(job), *check_kubernetes(job, block)] == []
    return Task(job, block, "sft.yaml", "data:\n  train_files: /data/train.parquet\n")


def documents(kind: str, **more: Any) -> list[Any]:
    return list(yaml.safe_load_all(to_yaml(render(task(kind, **more)))))


def pods(documents: list[Any]) -> list[Any]:
    """All specifications of pods."""
    found: list[Any] = []

    def visit(at: Any) -> None:
        for each in at.values() if isinstance(at, dict) else at if isinstance(at, list) else ():
            if isinstance(each, dict) and "containers" in each:
                found.append(each)
            else:
                visit(each)

    visit(documents)
    return found


def variables(pod: Any) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in pod["containers"][0]["env"]}


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind: str) -> None:
    """To make them anew: delete a file, run this test, look at what it wrote."""
    found, path = to_yaml(render(task(kind))), GOLDEN / f"{kind}.yaml"
    if not path.exists():
        path.write_text(found)
        pytest.fail(f"{path} was missing and is written: look at it")
    assert found == path.read_text()
    assert check_manifests(list(yaml.safe_load_all(found))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_counts_as_memory(kind: str) -> None:
    for pod in pods(documents(kind)):
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"]["memory"] == "108Gi"
        (shm,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "shm"]
        assert shm == {"medium": "Memory", "sizeLimit": "8Gi"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_ends_itself_before_its_pod_is_ended(kind: str) -> None:
    """So its end counts for the breaker, which a stop signal does not; the pod's deadline stands behind it."""
    found = documents(kind)
    for pod in pods(found):
        assert pod["terminationGracePeriodSeconds"] == 215
        assert pod["activeDeadlineSeconds"] == 4 * 3600
        trainer = found[-1]["spec"].get("trainer", {})
        arguments = trainer.get("args") or pod["containers"][0]["args"]
        limits = [each for each in arguments if "max_wall_seconds" in each]
        assert limits == [f"trainer.max_wall_seconds={4 * 3600 - 215}"]
        assert arguments.index(limits[0]) < arguments.index("optim.lr=2e-5")
    unlimited = to_yaml(render(task(kind, job={"resources": Resources(memory_gib=8)})))
    assert "max_wall_seconds" not in unlimited
    assert "activeDeadlineSeconds" not in unlimited


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_are_references_and_the_rest_is_taken_literally(kind: str) -> None:
    for pod in pods(documents(kind)):
        found = variables(pod)
        assert found["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
        assert found["HOME"] == "/more/home"
        assert (found["CHECKPOINT_DIR"], found["NPROC_PER_NODE"], found["SFT_JOB_GPUS_PER_NODE"]) == ("/runs", "4", "4")
        assert found["ODD"] == "yes"
    assert "trainer.project_name=$$(HOME) and more" in to_yaml(render(task(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_data_is_read_only_unless_said_otherwise(kind: str) -> None:
    for pod in pods(documents(kind)):
        mounts = {each["mountPath"]: each for each in pod["containers"][0]["volumeMounts"]}
        claims = {each["name"]: each.get("persistentVolumeClaim") for each in pod["volumes"]}
        assert mounts["/data"]["readOnly"] is True
        assert claims[mounts["/data"]["name"]] == {"claimName": "data", "readOnly": True}
        assert "readOnly" not in mounts["/more"]
        assert "readOnly" not in claims[mounts["/runs"]["name"]]
        assert mounts["/runs/old"] == {"name": mounts["/runs"]["name"], "mountPath": "/runs/old", "readOnly": True}
        assert list(mounts).index("/runs") < list(mounts).index("/runs/old")


def test_the_nodes_of_a_job_find_one_another() -> None:
    """What each pod's variables say is what the job itself reads."""
    (pod,) = pods(documents("job"))
    given = variables(pod)
    assert given["NODE_RANK"] == {
        "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    }
    for node in range(3):
        topology, problems = read_topology({**given, "NODE_RANK": str(node)}, gpu_count=4)
        assert problems == []
        assert (topology.nnodes, topology.node_rank, topology.nproc_per_node) == (3, node, 4)
        assert (topology.master_addr, topology.master_port) == ("graph-sft-0.graph-sft", 23456)
    (service,) = [each for each in documents("job") if each["kind"] == "Service"]
    assert pod["subdomain"] == service["metadata"]["name"] == "graph-sft"


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_what_an_operator_sets_agrees_with_what_we_set(kind: str) -> None:
    pod = pods(documents(kind))[0]
    operator = {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "4"}
    operator |= {"PET_MASTER_ADDR": "graph-sft-master-0", "PET_MASTER_PORT": "23456", "RANK": "2", "WORLD_SIZE": "12"}
    topology, problems = read_topology({**variables(pod), **operator}, gpu_count=4)
    assert problems == []
    assert (topology.nnodes, topology.node_rank, topology.world) == (3, 2, 12)
    old = {name: value for name, value in operator.items() if not name.startswith("PET_")}
    _, problems = read_topology({**variables(pod), **old}, gpu_count=4)
    assert problems[0].subject == "NODE_RANK"  # and not a run on one node


@pytest.mark.parametrize("kind", KINDS)
def test_one_node_needs_no_meeting_place(kind: str) -> None:
    found = documents(kind, job={"resources": Resources(nodes=1, memory_gib=8)})
    (pod,) = pods(found)
    assert not {"NNODES", "NODE_RANK", "MASTER_ADDR"} & variables(pod).keys()
    assert check_manifests(found) == []


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_of_two_kinds_or_namespaces_are_two_jobs(kind: str) -> None:
    for pod in pods(documents(kind)):
        found = variables(pod)
        assert found["SFT_JOB_ID"] == f"$(SFT_JOB_NAMESPACE).{kind}.graph-sft"
        assert found["SFT_JOB_NAMESPACE"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
        assert list(found).index("SFT_JOB_NAMESPACE") < list(found).index("SFT_JOB_ID")  # or it is no value of it


def test_the_service_is_for_pods_of_the_job_alone() -> None:
    (service,) = [each for each in documents("job") if each["kind"] == "Service"]
    names = ("name", "instance", "managed-by", "component")
    assert set(service["spec"]["selector"]) == {f"app.kubernetes.io/{name}" for name in names}


def test_retries() -> None:
    by_kind = {kind: documents(kind)[-1]["spec"] for kind in KINDS}
    assert by_kind["pytorchjob"]["runPolicy"]["backoffLimit"] == 5
    assert by_kind["job"]["backoffLimit"] == 15  # each lost start ends three pods
    runtime = documents("trainjob")[-2]["spec"]["template"]["spec"]
    assert runtime["failurePolicy"]["maxRestarts"] == 5
    endless = documents("job", job={"retries": Retries(losses=None)})[-1]["spec"]["backoffLimit"]
    assert endless == 2**31 - 1
    assert PERMANENT == [1, 2, 65, 66, 73, 74, 86, 87, 88]


def test_kueue_lets_it_start() -> None:
    for kind in KINDS:
        document = documents(kind)[-1]
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
        assert document["spec"].get("runPolicy", document["spec"])["suspend"] is True
        assert good(kind)[-1]["spec"].get("runPolicy", good(kind)[-1]["spec"])["suspend"] is False


def test_another_config_has_another_name() -> None:
    one = task("job")
    other = Task(one.job, one.block, one.config_name, one.config + "# more\n")
    assert one.config_map != other.config_map
    assert one.config_map == task("job").config_map
    assert one.config_map != task("pytorchjob").config_map  # one is deleted, the other stays


def test_the_claim_is_not_removed_with_the_job() -> None:
    claim = documents("job")[0]
    assert (claim["kind"], claim["spec"]["resources"]["requests"]["storage"]) == ("PersistentVolumeClaim", "512Mi")
    assert not {"app.kubernetes.io/instance", "app.kubernetes.io/component"} & claim["metadata"]["labels"].keys()
    assert all(each["metadata"]["labels"]["app.kubernetes.io/instance"] for each in documents("job")[1:])


@settings(max_examples=40)
@given(st.text(min_size=1).filter(lambda text: text.isprintable() and not text.startswith("-")))
def test_any_text_reaches_the_job_as_it_is(text: str) -> None:
    given = task("job")
    given.job.overrides = [f"trainer.project_name={text}"]
    found = list(yaml.safe_load_all(to_yaml(render(given))))
    for pod in pods(found):
        (_, _, argument) = pod["containers"][0]["args"]
        assert argument == plain(f"trainer.project_name={text}")
        assert argument.replace("$$(", "$(") == given.job.overrides[0] or "$$(" in text


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    nodes=st.integers(1, 40),
    gpus=st.integers(0, 8),
    ranks=st.none() | st.integers(1, 8),
    memory=st.floats(0.01, 4000) | st.integers(1, 4000),
    shm=st.floats(0.01, 500),
    cpus=st.none() | st.integers(1, 256),
    grace=st.integers(1, 5000),
    time=st.none() | st.sampled_from(["10", "1:00:00", "2-0"]),
    losses=st.none() | st.integers(0, 10**10),
    claims=st.lists(st.sampled_from(["data:/data", "data:/more", "runs:/old", "x:/data/x:rw", "x:/y"]), unique=True),
    queue=st.none() | st.just("team"),
    mode=st.sampled_from(["ReadWriteMany", "ReadWriteOnce"]),
    preflight=st.booleans(),
)
def test_what_the_settings_allow_the_manifest_check_allows(kind: str, claims: list[str], **given: Any) -> None:
    """Nothing is refused late, by a path in a manifest, that a rule of the job file could have named."""
    resources = Resources(
        nodes=given["nodes"],
        gpus_per_node=given["gpus"],
        ranks_per_node=given["ranks"],
        cpus_per_node=given["cpus"],
        memory_gib=given["memory"],
        shm_gib=given["shm"],
        time=given["time"],
    )
    job = JobFile("any", "sft.yaml", image="x:1", checkpoint_dir="/runs", resources=resources)
    job.grace_seconds, job.preflight, job.retries.losses = given["grace"], given["preflight"], given["losses"]
    block = KubernetesSettings(kind, checkpoint_claim="runs", claims=claims, queue=given["queue"])
    block.checkpoint_access, block.checkpoint_size_gib = given["mode"], 10
    if [*validate(job), *check_kubernetes(job, block)]:
        return
    found = list(yaml.safe_load_all(to_yaml(render(Task(job, block, "sft.yaml", "a: 1\n")))))
    assert check_manifests(found) == []


@given(st.floats(min_value=0.001, max_value=1e5))
def test_sizes_are_never_less_than_was_asked(size: float) -> None:
    text = gibibytes(size)
    unit = {"Gi": 1, "Mi": 1 / 1024}[text[-2:]]
    assert size <= int(text[:-2]) * unit <= size + 1 / 1024 + 1e-9


def test_the_ready_made_job_file_is_a_job_file() -> None:
    assert loaded("job").job.name == "sft"
    assert Path(loaded("job").job.config).name == "sft_trainer.yaml"
