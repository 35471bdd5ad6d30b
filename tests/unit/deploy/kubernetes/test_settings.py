from __future__ import annotations

from typing import Any

import pytest

from deploy.kubernetes.settings import Claim, KubernetesSettings, check_kubernetes, parse_claim
from sft_job.jobfile.schema import JobFile, Resources, Retries

CANARY = "c0ffee" * 6
APPARMOR = "container.apparmor.security.beta.kubernetes.io"


def problems(block: dict[str, Any], **job: Any) -> list[Any]:
    made: dict[str, Any] = {
        "name": "mine",
        "config": "sft.yaml",
        "image": "x:1",
        "checkpoint_dir": "/runs",
        "resources": Resources(memory_gib=8),
    }
    given = JobFile(**{**made, **job})
    return check_kubernetes(given, KubernetesSettings(**{"checkpoint_claim": "runs", **block}))


def subjects(block: dict[str, Any], **job: Any) -> list[str]:
    return [problem.subject for problem in problems(block, **job)]


def test_what_is_good() -> None:
    assert subjects({}) == []
    assert subjects({"claims": ["data:/data", "models:/models:ro", "more:/more:rw"]}) == []
    assert subjects({"secrets": {"WANDB_API_KEY": "wandb/api-key"}}, secrets=["WANDB_API_KEY"]) == []
    assert subjects({}, resources=Resources(memory_gib=8, time="7:15")) == []
    assert subjects({"context": "arn:aws:eks:eu-west-1:123:cluster/ml"}) == []
    assert subjects({"claims": ["data:/data"]}, mounts=["/lustre/data:/data", "/runs/old"]) == []


@pytest.mark.parametrize(
    ("block", "subject"),
    [
        ({"kind": "mpijob"}, "kubernetes.kind"),
        ({"namespace": "Team_1"}, "kubernetes.namespace"),
        ({"context": "a b; reboot"}, "kubernetes.context"),
        ({"checkpoint_claim": None}, "kubernetes.checkpoint_claim"),
        ({"checkpoint_claim": "Runs"}, "kubernetes.checkpoint_claim"),
        ({"checkpoint_access": "RWX"}, "kubernetes.checkpoint_access"),
        ({"checkpoint_size_gib": 0}, "kubernetes.checkpoint_size_gib"),
        ({"claims": ["data"]}, "kubernetes.claims[0]"),
        ({"claims": ["data:/a:rx"]}, "kubernetes.claims[0]"),
        ({"claims": ["data:/a/../b"]}, "kubernetes.claims[0]"),
        ({"claims": ["data:/runs"]}, "kubernetes.claims[0]"),
        ({"claims": ["a:/tmp"]}, "kubernetes.claims[0]"),
        ({"claims": ["a:/data", "b:/data"]}, "kubernetes.claims[1]"),
        ({"secrets": {"HF_TOKEN": CANARY}}, "kubernetes.secrets.HF_TOKEN"),
        ({"secrets": {"HF_TOKEN": "hf_" + "a1B2c3D4e5" * 3}}, "kubernetes.secrets.HF_TOKEN"),
        ({"secrets": {"NNODES": "a/b"}}, "kubernetes.secrets.NNODES"),
        ({"secrets": {"A B": "a/b"}}, "kubernetes.secrets.A B"),
        ({"image_pull_secrets": ["My Secret"]}, "kubernetes.image_pull_secrets[0]"),
        ({"image_pull_policy": "always"}, "kubernetes.image_pull_policy"),
        ({"node_selector": {"a b": "c"}}, "kubernetes.node_selector.a b"),
        ({"labels": {"app.kubernetes.io/instance": "x"}}, "kubernetes.labels.app.kubernetes.io/instance"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "kubernetes.labels.kueue.x-k8s.io/queue-name"),
        ({"labels": {"a": "b c"}}, "kubernetes.labels.a"),
        ({"annotations": {"a": "line\nline"}}, "kubernetes.annotations.a"),
        ({"annotations": {"example.org/api-token": CANARY}}, "kubernetes.annotations.example.org/api-token"),
        ({"labels": {"wandb-api-key": CANARY}}, "kubernetes.labels.wandb-api-key"),
        ({"annotations": {f"{APPARMOR}/sft-job": "unconfined"}}, f"kubernetes.annotations.{APPARMOR}/sft-job"),
        ({"tolerations": ["a=b:Sometimes"]}, "kubernetes.tolerations[0]"),
        ({"tolerations": ["a:NoSchedule:300"]}, "kubernetes.tolerations[0]"),
        ({"resources": {"memory": "8Gi"}}, "kubernetes.resources.memory"),
        ({"resources": {"rdma/ib": "one"}}, "kubernetes.resources.rdma/ib"),
        ({"user": 0}, "kubernetes.user"),
        ({"user": -1}, "kubernetes.user"),
        ({"user": 2**31}, "kubernetes.user"),
        ({"group": 2**31}, "kubernetes.group"),
        ({"ttl_seconds": 2**31}, "kubernetes.ttl_seconds"),
        ({"scratch_gib": float("inf")}, "kubernetes.scratch_gib"),
        ({"scratch_gib": float("nan")}, "kubernetes.scratch_gib"),
        ({"checkpoint_size_gib": 1e300}, "kubernetes.checkpoint_size_gib"),
        ({"resources": {"rdma/ib": "9" * 40}}, "kubernetes.resources.rdma/ib"),
        ({"secrets": {"PET_RDZV_ENDPOINT": "a/b"}}, "kubernetes.secrets.PET_RDZV_ENDPOINT"),
        ({"scratch_gib": 0}, "kubernetes.scratch_gib"),
        ({"master_port": 80}, "kubernetes.master_port"),
        ({"ttl_seconds": -1}, "kubernetes.ttl_seconds"),
        ({"ttl_seconds": 60, "kind": "trainjob"}, "kubernetes.ttl_seconds"),
    ],
)
def test_what_is_refused(block: dict[str, Any], subject: str) -> None:
    found = problems(block)
    assert [problem.subject for problem in found] == [subject]
    assert CANARY not in found[0].text()
    assert "a1B2c3D4e5" not in found[0].text()


@pytest.mark.parametrize(
    ("job", "subject"),
    [
        ({"name": "Mine"}, "name"),
        ({"name": "9lives"}, "name"),
        ({"name": "a" * 41}, "name"),
        ({"image": None}, "image"),
        ({"checkpoint_dir": "runs"}, "checkpoint_dir"),
        ({"checkpoint_dir": "/tmp"}, "checkpoint_dir"),
        ({"checkpoint_dir": "/a:b"}, "checkpoint_dir"),
        ({"mounts": ["/lustre/data"]}, "mounts[0]"),
        ({"secrets": ["HF_TOKEN"]}, "secrets[0]"),
        ({"resources": Resources()}, "resources.memory_gib"),
        ({"resources": Resources(memory_gib=0)}, "resources.memory_gib"),
        ({"resources": Resources(memory_gib=8, shm_gib=0)}, "resources.shm_gib"),
        ({"resources": Resources(memory_gib=8, time="2:10")}, "resources.time"),
        ({"resources": Resources(memory_gib=8, time="7:14")}, "resources.time"),
        ({"resources": Resources(nodes=1001, memory_gib=8)}, "resources.nodes"),
        ({"grace_seconds": 2**31 - 1}, "grace_seconds"),
        ({"retries": Retries(timeouts=3)}, "retries.timeouts"),
        ({"retries": Retries(preemptions=0)}, "retries.preemptions"),
    ],
)
def test_what_a_pod_cannot_do(job: dict[str, Any], subject: str) -> None:
    assert subjects({}, **job) == [subject]


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod"])
def test_several_nodes_need_a_claim_that_they_can_share(mode: str) -> None:
    several = Resources(nodes=2, memory_gib=8)
    assert subjects({"checkpoint_access": mode}) == []
    assert subjects({"checkpoint_access": mode}, resources=several) == ["kubernetes.checkpoint_access"]
    assert subjects({}, resources=several) == []


def test_claims() -> None:
    assert parse_claim("data:/data/") == Claim("data", "/data", False)
    assert parse_claim("data:/data:rw") == Claim("data", "/data", True)
    with pytest.raises(ValueError, match="must be CLAIM:/path"):
        parse_claim("/data:/data")


def test_the_fix_is_a_name_that_is_good() -> None:
    for name in ("Graph_SFT.2", "---", "9", "a" * 99):
        (problem,) = problems({}, name=name)
        assert subjects({}, name=problem.fix.removeprefix("name: ")) == []
