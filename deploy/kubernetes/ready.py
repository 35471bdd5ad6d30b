"""Writes the ready-made manifests below ``deploy/manifests`` (``make manifests``).

They are what ``sft-job submit kubernetes`` makes of ``deploy/manifests/job.yaml``, a folder for each kind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from deploy.kubernetes.check import check_manifests
from deploy.kubernetes.render import KINDS, render, to_yaml
from deploy.kubernetes.settings import KubernetesSettings, check_kubernetes
from deploy.kubernetes.submit import make_task
from sft_job.errors import raise_problems
from sft_job.jobfile.load import load_job

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "manifests"
_HEAD = "# Made by `make manifests` from deploy/manifests/job.yaml and sft_trainer.yaml beside it.\n"


def ready_made(environ: Mapping[str, str]) -> dict[Path, str]:
    """Path -> text of every ready-made file.

    Raises:
        ProblemsError: the job file, or what was rendered, is wrong (2).
    """
    files: dict[Path, str] = {}
    for kind in KINDS:
        more = [f"kubernetes.kind={kind}"]
        loaded = load_job(FOLDER / "job.yaml", more, "kubernetes", KubernetesSettings, check_kubernetes)
        task, _ = make_task(loaded, environ, ROOT)
        objects = render(task)
        raise_problems(check_manifests(list(yaml.safe_load_all(to_yaml(objects)))))
        claims = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
        # Not in the kustomization: `kubectl delete -k` would remove it with all checkpoints.
        files[FOLDER / "claim.yaml"] = f"{_HEAD}# Once: kubectl apply -f deploy/manifests/claim.yaml\n{to_yaml(claims)}"
        files[FOLDER / kind / "job.yaml"] = _HEAD + to_yaml([each for each in objects if each not in claims])
        name, _, tag = (task.job.image or "").rpartition(":")
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["job.yaml"],
            "images": [{"name": name, "newName": name, "newTag": tag}],
        }
        apply = f"kubectl apply --server-side -k deploy/manifests/{kind}"
        head = f"{_HEAD}# Edit images here; a namespace may be added: {apply}\n"
        files[FOLDER / kind / "kustomization.yaml"] = head + yaml.safe_dump(kustomization, sort_keys=False)
    return files


def main() -> int:
    """Write them."""
    for path, text in ready_made({}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
