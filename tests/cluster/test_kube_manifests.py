"""What a real API server says of our manifests, with the real definitions of PyTorchJob, TrainJob and JobSet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from deploy.kubernetes.check import check_manifests
from deploy.kubernetes.kubectl import Kubectl
from deploy.kubernetes.render import KINDS
from sft_job.errors import JobError
from tests.cluster.conftest import REQUIRED
from tests.cluster.kube_server import REPOSITORY, NoServerError, Server
from tests.unit.deploy.kubernetes.mutations import CANARY, MUTATIONS, Mutation, good

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

READY = REPOSITORY / "deploy" / "manifests"
GOLDEN = REPOSITORY / "tests" / "golden" / "kubernetes"
FILES = [
    READY / "claim.yaml",
    *(READY / kind / "job.yaml" for kind in KINDS),
    *(GOLDEN / f"{kind}.yaml" for kind in KINDS),
]


@pytest.fixture(scope="session")
def server(shared: Path, testrun_uid: str) -> Iterator[Server]:
    """An API server for all workers; the one that is done last ends it."""
    users = shared / "kube-users"
    with FileLock(shared / "kube.lock"):
        try:
            found = Server(Path(f"/tmp/sft-kube-{testrun_uid[:8]}"), 20000 + int(testrun_uid[:4], 16) // 8)
        except NoServerError as reason:
            if os.environ.get(REQUIRED) == "1":
                pytest.fail(f"{REQUIRED}=1, and no API server starts: {reason}")
            pytest.skip(f"no API server starts here: {reason}")
        count = int(users.read_text()) if users.exists() else 0
        if count == 0:
            found.define()
        users.write_text(str(count + 1))
    yield found
    with FileLock(shared / "kube.lock"):
        left = int(users.read_text()) - 1
        users.write_text(str(left))
        if left == 0:
            found.close()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_server_takes_what_we_write(server: Server, path: Path) -> None:
    text = path.read_text()
    documents = list(yaml.safe_load_all(text))
    assert server.refusal(documents) == ""
    assert documents
    assert CANARY not in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_takes_one_node(server: Server, kind: str) -> None:
    given = good(kind, "resources.nodes=1", "resources.gpus_per_node=0", "resources.time=null")
    assert server.refusal(given) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutated_manifest_is_accepted_by_nobody(server: Server, mutation: Mutation) -> None:
    documents = mutation.documents()
    refusal = server.refusal(documents)
    assert refusal or check_manifests(documents), "accepted by the server and by our own check"
    if mutation.server:
        assert refusal, "the server used to refuse this"


def test_the_server_knows_what_it_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitting's own way to the cluster, as far as a server of custom resources alone goes."""
    for name in ("KUBECONFIG", "PATH"):
        monkeypatch.setenv(name, server.environ[name])
    kubectl = Kubectl("crd", "team")
    job: dict[str, Any] = next(each for each in good("pytorchjob", "name=real") if each["kind"] == "PyTorchJob")
    resource = KINDS["pytorchjob"].resource
    try:
        assert not kubectl.exists(resource, "real")
        assert kubectl.apply(yaml.safe_dump(job)) == ["pytorchjob.kubeflow.org/real serverside-applied"]
        assert kubectl.exists(resource, "real")
        patch = KINDS["pytorchjob"].suspend.format("true")
        line = ["patch", resource, "real", "--namespace=team", "--type=merge", f"--patch={patch}"]
        assert server.ask(*line).returncode == 0
        path = ["get", resource, "real", "--namespace=team", "--output=jsonpath={.spec.runPolicy.suspend}"]
        assert server.ask(*path).stdout == "true"
        assert kubectl.objects("persistentvolumeclaims", ["runs"]) is None  # this server has none: nothing is refused
        job["spec"]["foo"] = 1
        with pytest.raises(JobError, match=r'(?s)kubectl apply failed:.*"?spec\.foo"?'):
            kubectl.apply(yaml.safe_dump(job))
        with pytest.raises(JobError, match="doesn't have a resource type"):
            kubectl.exists("mpijobs.kubeflow.org", "real")
    finally:
        server.ask("delete", resource, "real", "--namespace=team", "--ignore-not-found")
