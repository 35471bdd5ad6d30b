"""The ready-made manifests are what the renderer makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes.ready import FOLDER, ready_made
from deploy.kubernetes.render import KINDS


def test_ready_made_manifests_are_those_of_the_renderer() -> None:
    found = ready_made({})
    made = {path for path in FOLDER.rglob("*") if path.is_file() and path.name not in ("sft_trainer.yaml",)}
    assert made - {FOLDER / "job.yaml"} == set(found)
    for path, text in found.items():
        assert path.read_text() == text, f"{path}: make manifests"


def test_applying_and_deleting_a_folder_spares_the_checkpoints() -> None:
    for kind in KINDS:
        kustomization = yaml.safe_load((FOLDER / kind / "kustomization.yaml").read_text())
        assert kustomization["resources"] == ["job.yaml"]
        assert "namespace" not in kustomization  # it would count for more than kubectl's own, and than -n
        documents = list(yaml.safe_load_all((FOLDER / kind / "job.yaml").read_text()))
        assert "PersistentVolumeClaim" not in {each["kind"] for each in documents}
    (claim,) = yaml.safe_load_all((FOLDER / "claim.yaml").read_text())
    assert claim["kind"] == "PersistentVolumeClaim"


# The virtual environment's own, where a machine has none.
KUBECTL = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl")
@pytest.mark.parametrize("kind", KINDS)
def test_kustomize_changes_namespace_and_image(kind: str, tmp_path) -> None:
    shutil.copytree(FOLDER / kind, tmp_path / kind)
    path = tmp_path / kind / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text())
    kustomization["namespace"] = "team"
    kustomization["images"][0] |= {"newName": "example.org/mine", "newTag": "2.0"}
    path.write_text(yaml.safe_dump(kustomization))
    done = subprocess.run([str(KUBECTL), "kustomize", str(tmp_path / kind)], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["namespace"] for each in documents} == {"team"}
    images = {
        line.split()[-1] for line in done.stdout.splitlines() if line.strip().removeprefix("- ").startswith("image:")
    }
    assert images == {"example.org/mine:2.0"}
