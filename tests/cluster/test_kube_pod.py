"""A pod of the real image, run by a real kubelet: it trains, is deleted, comes again, and ends as if it had not been.

Outside CI: the kubelet's first build takes minutes. ``make test-kubelet`` runs it; ``IMAGE_TAR=archive`` (what ``docker
save`` wrote) names the image, otherwise ``make image`` builds it with what its variables say.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from deploy.kubernetes.kubectl import Kubectl
from sft_job.demo.run import DemoFolder, make_input
from tests.cluster.kube_server import REPOSITORY, NoServerError, Server

WANTED = "SFT_JOB_KUBELET"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get(WANTED) != "1", reason="make test-kubelet runs it"),
]

USER = 10001
PORT = 19443
CANARY = "c0ffee" * 6
BUILT = "docker.io/local/sft-job:kubelet"
# This kubelet's cluster is of Kubernetes 1.20: what came later is not known there.
LATER = ("completionMode", "podFailurePolicy", "suspend")


@dataclass(frozen=True)
class Image:
    """An image in an archive that containerd reads.

    Attributes:
        name: in full, as a pod must name it.
        archive: of ``docker save``.
    """

    name: str
    archive: Path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    given = os.environ.get("IMAGE_TAR")
    if not given:
        archive = tmp_path_factory.mktemp("image") / "image.tar"
        for command in (["make", "image", f"IMAGE={BUILT}"], ["docker", "save", f"--output={archive}", BUILT]):
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        return Image(BUILT, archive)
    with tarfile.open(given) as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None, f"{given} is no archive of docker save"
        (name,) = json.load(manifest)[0]["RepoTags"]
    first = name.partition("/")[0]
    full = name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"
    return Image(full, Path(given))


@pytest.fixture(scope="module")
def node(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A node with a kubelet, which has the image."""
    folder = Path(f"/tmp/sft-kubelet-{os.getpid()}")
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "image.tar").symlink_to(image.archive.resolve())
    binaries = Path(os.environ.get("KUBE_BIN") or Path.home() / ".cache" / "sft_job" / "kube-bin")
    try:
        found = Server(folder, PORT, ["--node"], binaries)
    except NoServerError as reason:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.fail(f"no kubelet starts: {reason}")
    yield found
    found.ask("--context=core", "delete", "jobs", "--all", "--wait=true", "--timeout=90s")
    found.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo trains on, for every user to read."""
    paths = DemoFolder(tmp_path_factory.mktemp("demo"))
    with Path(os.devnull).open("w") as nowhere:
        make_input(paths, 3000, 100, Console(file=nowhere))
    folder = paths.train.parent
    for each in (folder, *folder.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    for each in folder.parents[:3]:
        each.chmod(each.stat().st_mode | 0o055)
    return folder


@dataclass
class PodRun:
    """A job of one pod, and its run folder on this machine.

    Attributes:
        node: where.
        name: of the job.
        root: ``CHECKPOINT_DIR``, as this machine sees it.
    """

    node: Server
    name: str
    root: Path

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        done = self.node.ask("--context=core", *arguments, given=given)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def pods(self) -> list[Any]:
        line = ["get", "pods", f"--selector=app.kubernetes.io/instance={self.name}", "--output=json"]
        return json.loads(self.kubectl(*line))["items"]

    def log(self) -> str:
        return self.node.ask("--context=core", "logs", f"job/{self.name}", "--tail=60").stdout

    def step(self) -> int:
        try:
            lines = (self.root / "sft" / "logs" / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (OSError, ValueError):
            return 0

    def outcome(self) -> dict[str, Any]:
        return json.loads((self.root / "sft" / "logs" / "outcome.json").read_text())

    def wait(self, what: str, reached: Callable[[], object], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > end:
                about = self.node.ask("--context=core", "describe", "pods").stdout[-4000:]
                raise AssertionError(f"{self.name}: not in {seconds} s: {what}\n{about}\n{self.log()}")
            time.sleep(0.1)

    def done(self) -> bool:
        status = json.loads(self.kubectl("get", "job", self.name, "--output=json")).get("status", {})
        over = [each["type"] for each in status.get("conditions", []) if each["status"] == "True"]
        assert "Failed" not in over, self.log()
        return bool(status.get("succeeded"))


@pytest.fixture
def pod_run(node: Server, image: Image, inputs: Path, tmp_path: Path) -> Callable[[str], PodRun]:
    """``pod_run(name)``: what ``sft-job submit kubernetes --kind job`` renders, on claims of this machine's folders."""

    def start(name: str) -> PodRun:
        root = tmp_path / name
        root.mkdir()
        os.chown(root, USER, USER)
        for each in tmp_path.parents[:2]:
            each.chmod(each.stat().st_mode | 0o055)
        tmp_path.chmod(0o755)
        run = PodRun(node, name, root)
        claims = [*_claim(f"{name}-runs", root, "ReadWriteMany"), *_claim(f"{name}-input", inputs, "ReadOnlyMany")]
        run.kubectl("apply", "--filename=-", given=yaml.safe_dump_all(claims))
        secret = ["create", "secret", "generic", f"{name}-secret", f"--from-literal=key={CANARY}"]
        run.kubectl(*secret)
        job = tmp_path / f"{name}.yaml"
        job.write_text(yaml.safe_dump(_job_file(name, image.name)))
        command = [sys.executable, "-m", "sft_job.cli", "submit", "kubernetes", str(job), "--kind=job", "--dry-run"]
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HUB_TOKEN": CANARY}
        shown = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert CANARY not in shown.stdout
        documents = list(yaml.safe_load_all(shown.stdout))
        for field in LATER:
            del documents[-1]["spec"][field]
        run.kubectl("apply", "--filename=-", given=yaml.safe_dump_all(documents))
        return run

    return start


def _claim(name: str, folder: Path, mode: str) -> list[Any]:
    """A claim of a folder of this machine; the pod sees no more than a claim."""
    size = {"storage": "1Gi"}
    volume = {
        "accessModes": [mode],
        "capacity": size,
        "hostPath": {"path": str(folder), "type": "Directory"},
        "claimRef": {"name": name, "namespace": "default"},
        "storageClassName": "",
    }
    claim = {"accessModes": [mode], "resources": {"requests": size}, "storageClassName": "", "volumeName": name}
    about = {"metadata": {"name": name}}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", **about, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **about, "spec": claim},
    ]


def _job_file(name: str, image: str) -> dict[str, Any]:
    return {
        "name": name,
        "config": "sft_job/recipes/demo.yaml",
        "image": image,
        "checkpoint_dir": "/runs",
        "environment": {"OMP_NUM_THREADS": "1"},
        "overrides": [
            "data.train_files=/input/train.parquet",
            "data.val_files=/input/validation.parquet",
            "model.partial_pretrain=/input/model",
            "trainer.logger=[console]",
        ],
        "secrets": ["HUB_TOKEN"],
        "grace_seconds": 60,
        "resources": {"gpus_per_node": 0, "ranks_per_node": 2, "memory_gib": 6, "shm_gib": 0.25},
        "kubernetes": {
            "checkpoint_claim": f"{name}-runs",
            "claims": [f"{name}-input:/input"],
            "secrets": {"HUB_TOKEN": f"{name}-secret/key"},
            "image_pull_policy": "Never",
            "scratch_gib": 2,
            "user": USER,
            "group": USER,
        },
    }


def test_a_pod_that_is_deleted_comes_again_and_ends_the_same(
    pod_run: Callable[[str], PodRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = pod_run("alone")
    alone.wait("the end of the run that nobody disturbs", alone.done)
    expected = alone.outcome()
    assert (expected["code"], expected["restarts"]) == (0, [])

    struck = pod_run("struck")
    struck.wait("some steps", lambda: struck.step() >= expected["step"] // 3)
    (first,) = struck.pods()
    struck.kubectl("delete", "pod", first["metadata"]["name"], "--wait=false")
    struck.wait("a checkpoint of the stop", lambda: struck.outcome().get("code") == 143)
    stopped = struck.outcome()
    assert 0 < stopped["step"] < expected["step"]
    struck.wait("the end", struck.done)
    (second,) = struck.pods()
    assert second["metadata"]["uid"] != first["metadata"]["uid"]

    found = struck.outcome()
    assert found["code"] == 0
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert [each["cause"] for each in found["restarts"]] == ["stopped"]
    assert found["version"] == expected["version"]
    # Files are of the pod's user, and no secret is in any of them.
    owners = {path.stat().st_uid for path in struck.root.rglob("*")}
    assert owners == {USER}
    assert not [path for path in struck.root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert CANARY not in struck.log()
    # What submitting asks the cluster about claims.
    for name in ("KUBECONFIG", "PATH"):
        monkeypatch.setenv(name, struck.node.environ[name])
    claims = Kubectl("core", None).objects("persistentvolumeclaims", ["struck-runs", "absent"])
    assert claims is not None
    assert {name: each["spec"]["accessModes"] for name, each in claims.items()} == {"struck-runs": ["ReadWriteMany"]}
    spec = second["spec"]
    assert spec["terminationGracePeriodSeconds"] == 75
    assert not [each for each in spec["volumes"] if "default-token" in each["name"]]
