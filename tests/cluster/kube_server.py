"""A real Kubernetes API server for tests, with the real custom resource definitions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

REPOSITORY = Path(__file__).parents[2]
OF_CUSTOM_RESOURCES = ("kubeflow.org/v1", "trainer.kubeflow.org/v1alpha1", "jobset.x-k8s.io/v1alpha2")
_OLDEST_KUBECTL = (1, 27)
_SERVED_SECONDS = 60.0


class NoServerError(Exception):
    """No API server can be started here; the text is the reason."""


def tools() -> Path:
    """Where the scripts are that start one."""
    return Path(os.environ.get("SFT_JOB_TEST_TOOLS") or REPOSITORY.parent / "shared" / "tools")


class Server:
    """etcd and the API server of custom resources; one that is up in this folder is joined.

    Args:
        folder: its state.
        port: the first of its eight ports.
        options: of ``kube-up``.
        binaries: folder that keeps binaries from one start to the next; None = below the state.
    """

    def __init__(self, folder: Path, port: int, options: Sequence[str] = (), binaries: Path | None = None) -> None:
        self._up, self._down = tools() / "kube-up", tools() / "kube-down"
        if not self._up.is_file():
            raise NoServerError(f"there is no {self._up}; SFT_JOB_TEST_TOOLS names its folder")
        self.folder = folder
        # The virtual environment's own kubectl first: it is new enough.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environ = {**os.environ, "PATH": path, "KUBE_PORT": str(port)}
        if binaries is not None:
            self.environ["KUBE_BIN"] = str(binaries)
        up = subprocess.run(
            [str(self._up), *options, str(folder)], env=self.environ, capture_output=True, text=True, check=False
        )
        if up.returncode != 0:
            raise NoServerError(f"kube-up: {up.stderr.strip().splitlines()[-1:]}")
        self.environ["KUBECONFIG"] = up.stdout.strip().splitlines()[-1].partition("=")[2]
        said = self.ask("version", "--client").stdout
        found = re.search(r"v(\d+)\.(\d+)\.", said)
        if found is None or (int(found[1]), int(found[2])) < _OLDEST_KUBECTL:
            self.close()
            raise NoServerError(f"kubectl is too old, or none: {said.splitlines()[:1]}")

    def define(self) -> None:
        """Make the custom resources known; their definitions lie beside the scripts."""
        done = self.ask("apply", "--server-side", "--output=name", f"--filename={tools().parent / 'crds'}")
        assert done.returncode == 0, done.stderr
        wanted = {line.partition("/")[2] for line in done.stdout.split()}
        # The server serves them a moment after it has taken them, and says so a moment later.
        deadline = time.monotonic() + _SERVED_SECONDS
        while not wanted <= set(self.ask("api-resources", "--cached=false", "--output=name").stdout.split()):
            assert time.monotonic() < deadline, f"the server does not serve all of {sorted(wanted)}"
            time.sleep(0.2)

    def ask(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """What kubectl says."""
        return subprocess.run(
            ["kubectl", *arguments], env=self.environ, input=given, capture_output=True, text=True, check=False
        )

    def refusal(self, documents: Sequence[Any]) -> str:
        """Why the server, or the schema of its own kinds, does not take these documents; '' where it does.

        The server knows custom resources alone. A Job is given to it as the one job of a JobSet, whose definition
        holds all of a Job's; besides, Kubernetes' own kinds are held against their published schemas.
        """
        said: list[str] = []
        resources: list[Any] = []
        for document in documents:
            if document["apiVersion"] in OF_CUSTOM_RESOURCES:
                resources.append(document)
                continue
            try:
                kubernetes_validate.validate(document, "1.37", strict=True)
            except kubernetes_validate.ValidationError as error:
                said.append(f"{document['kind']}: {error.message}")
            if document["kind"] == "Job":
                jobs = [{"name": "node", "template": {"spec": document["spec"]}}]
                about = {"name": document["metadata"]["name"]}
                set_ = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": about}
                resources.append({**set_, "spec": {"replicatedJobs": jobs}})
        if resources:
            arguments = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename=-"]
            done = self.ask(*arguments, given=yaml.safe_dump_all(resources))
            said += [done.stderr.strip()] * (done.returncode != 0)
        return "\n".join(said)

    def close(self) -> None:
        subprocess.run([str(self._down), str(self.folder)], env=self.environ, capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
