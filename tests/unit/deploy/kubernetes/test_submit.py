"""The real command with a kubectl that writes down what it got."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_job.submissions import find

CANARY = "c0ffee" * 6
CONFIG = "data: {train_files: /data/train.parquet}\nmodel: {partial_pretrain: /models/base}\n"
CLAIMS = {
    "kind": "List",
    "items": [
        {"metadata": {"name": "runs"}, "spec": {"accessModes": ["ReadWriteMany"]}},
        {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}},
    ],
}
KUBECTL = """#!/bin/bash
echo "$@" >>"$HOME/said"
case "$*" in
  *"get persistentvolumeclaims"*) cat "$HOME/claims" ;;
  *" get "*|"get "*) cat "$HOME/there" ;;
  *apply*) cat >"$HOME/applied"; [ ! -e "$HOME/refuse" ] || { cat "$HOME/refuse" >&2; exit 1; }; echo applied ;;
esac
"""


@pytest.fixture
def desk(tmp_path: Path):
    """A folder with job and config, and kubectl on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "kubectl").write_text(KUBECTL)
    (tools / "kubectl").chmod(0o755)
    (tmp_path / "claims").write_text(json.dumps(CLAIMS))
    (tmp_path / "there").write_text("")
    (tmp_path / "sft.yaml").write_text(CONFIG)
    kubernetes = {
        "namespace": "team",
        "checkpoint_claim": "runs",
        "claims": ["data:/data"],
        "secrets": {"WANDB_API_KEY": "wandb/api-key"},
    }
    job = {
        "name": "mine",
        "config": "sft.yaml",
        "image": "example.org/sft-job:1",
        "checkpoint_dir": "/runs",
        "secrets": ["WANDB_API_KEY"],
        "resources": {"memory_gib": 8},
        "kubernetes": kubernetes,
        "slurm": {"partition": "batch"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def run(*arguments: str, verb: str = "submit kubernetes job.yaml", **more: str):
        environ = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "sft_job.cli", *verb.split(), *arguments],
            cwd=tmp_path,
            env={**environ, "WANDB_API_KEY": CANARY} | more,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error without the imports."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_applied_and_shown(desk, tmp_path: Path) -> None:
    done = desk()
    assert done.returncode == 0, words(done)
    kubectl = "kubectl --namespace=team"
    patch = """--type=merge '--patch={"spec":{"runPolicy":{"suspend":true}}}'"""
    assert done.stdout.splitlines() == [
        "only the pods can tell: sft.yaml:2: model.partial_pretrain = '/models/base': is seen by no mount of the "
        "container: it would have to be in the image (fix: add it: kubernetes.claims: [CLAIM:/models/base])",
        "not counted on Kubernetes: retries.without_checkpoint; starts that come no further end with 86",
        "not counted by this operator after exit codes: retries.losses; starts that come no further end with 86",
        "applied",
        "submitted pytorchjob mine: 1 node(s), 1 rank(s) on each",
        f"log: {kubectl} logs --follow pod/mine-master-0",
        "run folder: /runs/sft on the claim runs",
        f"how it stands: {kubectl} exec pod/mine-master-0 -- sft-job status",
        "what is known of it here: sft-job status team.pytorchjob.mine",
        f"stop it for a while (it saves first): {kubectl} patch pytorchjobs.kubeflow.org mine {patch}",
        f"stop it for good (it saves first): {kubectl} delete pytorchjobs.kubeflow.org,configmaps "
        "--selector=app.kubernetes.io/name=sft-job,app.kubernetes.io/instance=mine,app.kubernetes.io/managed-by=sft-job,"
        "app.kubernetes.io/component=pytorchjob",
    ]
    assert (tmp_path / "said").read_text().splitlines()[-1] == (
        "--namespace=team apply --server-side --field-manager=sft-job --validate=strict --filename=-"
    )
    config, job = yaml.safe_load_all((tmp_path / "applied").read_text())
    assert config["data"] == {"sft.yaml": CONFIG}
    assert job["metadata"]["namespace"] == "team"


def test_a_dry_run_is_a_manifest_and_needs_no_kubectl(desk, tmp_path: Path) -> None:
    (tmp_path / "tools" / "kubectl").unlink()
    done = desk("--kind", "job", "--dry-run", "optim.lr=1e-5")
    assert done.returncode == 0, words(done)
    assert done.stdout.startswith("# only the pods can tell: ")
    config, service, job = yaml.safe_load_all(done.stdout)
    assert [each["kind"] for each in (config, service, job)] == ["ConfigMap", "Service", "Job"]
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == [
        "train",
        "/etc/sft_job/sft.yaml",
        "optim.lr=1e-5",
    ]
    assert not (tmp_path / ".local").exists()
    if not any(Path(each, "kubectl").exists() for each in ("/usr/bin", "/bin")):
        assert "kubectl is not on PATH" in words(desk())


def test_the_job_is_known_by_its_name(desk, tmp_path: Path) -> None:
    assert desk().returncode == 0
    known = find("kubernetes:team.pytorchjob.mine", {"HOME": str(tmp_path)})
    assert (known.run, known.place) == ("/runs/sft", "the claim runs")
    shown = desk(verb="status team.pytorchjob.mine").stdout
    assert "its run folder is not seen from here: it lies on the claim runs" in shown
    assert "kubectl --namespace=team exec pod/mine-master-0 -- sft-job status" in shown


def test_submitting_imports_no_torch(desk) -> None:
    done = desk("--dry-run")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "deploy.kubernetes.submit" in imported
    heavy = ("torch", "transformers", "pyarrow", "numpy", "submitit", "kubernetes")
    assert not {name for name in imported if name.partition(".")[0] in heavy}


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob", "job"])
def test_no_secret_in_what_is_applied_or_said(desk, tmp_path: Path, kind: str) -> None:
    done = desk("--kind", kind)
    assert done.returncode == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("config", "arguments", "subject"),
    [
        (f"{CONFIG}trainer: {{project_name: {CANARY}}}\n", [], "config"),
        (CONFIG, ["trainer.project_name=${oc.env:WANDB_API_KEY}"], "overrides[0]"),
        (CONFIG, ["environment.NOTE=${oc.env:WANDB_API_KEY}"], "environment.NOTE"),
        (CONFIG, ["kubernetes.annotations.note=${oc.env:WANDB_API_KEY}"], "kubernetes.annotations.note"),
        (CONFIG, ["kubernetes.secrets.WANDB_API_KEY=${oc.env:WANDB_API_KEY}"], "kubernetes.secrets.WANDB_API_KEY"),
    ],
)
def test_a_secret_has_no_way_into_a_manifest(desk, tmp_path, config: str, arguments: list[str], subject: str) -> None:
    (tmp_path / "sft.yaml").write_text(config)
    if subject == "overrides[0]":  # a job file's own list resolves; a word of the run is for the run to resolve
        arguments = [f'overrides=["{arguments[0]}"]']
    done = desk("--dry-run", *arguments)
    assert done.returncode == 2
    assert subject in words(done)
    assert CANARY not in done.stdout + done.stderr


def test_errors_of_the_run_s_settings_are_found_here(desk, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(f"{CONFIG}optim: {{lrr: 1}}\n")
    done = desk("ulysses_sequence_parallel_size=3", "resources.nodes=2", "kubernetes.checkpoint_acess=x")
    assert done.returncode == 2
    assert "did you mean kubernetes.checkpoint_access?" in words(done)
    said = words(desk("ulysses_sequence_parallel_size=3", "resources.nodes=2"))
    assert "sft.yaml:3: optim.lrr" in said
    assert "ulysses_sequence_parallel_size = 3" in said
    assert not (tmp_path / "applied").exists()
    (tmp_path / "sft.yaml").unlink()
    assert "config = 'sft.yaml'\n    there is no such file" in words(desk())


def test_files_that_the_pods_do_not_see(desk, tmp_path: Path) -> None:
    seen = ("data.cache_dir=/runs/cache", "data.val_files=/data/*.parquet", "data.chat_template='{{ messages }}'")
    done = desk("model.partial_pretrain=/data/base", *seen, "--dry-run")
    assert done.returncode == 0, words(done)
    assert "has to be" not in done.stdout
    assert "is seen by" not in done.stdout
    done = desk(
        "data.chat_template=t.jinja", "data.cache_dir=/data/cache", "data.val_files=/tmp/v.parquet", "--dry-run"
    )
    assert done.returncode == 2
    said = words(done)
    assert said.startswith("3 problems:")
    for text in (
        "data.chat_template = 't.jinja'\n    is no absolute path: in the container it would begin at /\n    fix: "
        "data.chat_template=/absolute/path/to/t.jinja, and kubernetes.claims: [CLAIM:/absolute/path/to] unless",
        "data.cache_dir = '/data/cache'\n    is not mounted for the job to write there\n    fix: add it: "
        "kubernetes.claims: [CLAIM:/data/cache:rw]",
        "data.val_files = '/tmp/v.parquet'\n    is seen by no mount of the container\n    fix: put it into a "
        "folder of its own and add that: /tmp is made with the container",
    ):
        assert f"job.yaml:2: {text}" in said or f"command line: {text}" in said, text


def test_what_the_image_may_hold_is_told_and_not_refused(desk) -> None:
    """A pod sees no folder of this machine, whether it is here or not."""
    done = desk("data.custom_cls.path=/etc/passwd", "data.custom_cls.name=Mine", "model.external_lib=yaml", "--dry-run")
    assert done.returncode == 0, words(done)
    told = [line.partition("command line: ")[2] for line in done.stdout.splitlines() if "command line: " in line]
    assert told == [
        "data.custom_cls.path = '/etc/passwd': is seen by no mount of the container: it would have to be in the image "
        "(fix: add it: kubernetes.claims: [CLAIM:/etc/passwd])",
        "model.external_lib = 'yaml': would have to be installed in the image, or lie in a mounted folder of "
        "PYTHONPATH (fix: install it in the image)",
    ]


def test_a_module_that_a_variable_of_the_pods_names(desk, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(CONFIG.replace("base}", "base, external_lib: '${oc.env:ONLY_THERE}'}"))
    done = desk("--dry-run")
    assert done.returncode == 0, words(done)
    assert "# only the pods can tell: sft.yaml:2: model.external_lib = '${oc.env:ONLY_THERE}': cannot be" in done.stdout


def test_a_secret_of_a_pod_need_not_be_here(desk) -> None:
    assert desk("--dry-run", WANDB_API_KEY="").returncode == 0


def test_a_name_that_is_taken(desk, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("pytorchjob.kubeflow.org/mine\n")
    done = desk()
    assert done.returncode == 2
    assert "name = 'mine'\n    the cluster has a job of this name (pytorchjobs.kubeflow.org)" in words(done)
    assert "kubectl --namespace=team delete pytorchjobs.kubeflow.org mine" in words(done)
    assert not (tmp_path / "applied").exists()


def test_claims_that_are_not_there_or_cannot_be_shared(desk, tmp_path: Path) -> None:
    done = desk("resources.nodes=2")
    assert done.returncode == 2
    assert "job.yaml" in words(done)
    assert "2 nodes use it, and its access mode is ReadWriteOnce" in words(done)
    (tmp_path / "claims").write_text("")
    assert words(desk()).count("there is no such claim in this namespace") == 2
    assert words(desk("kubernetes.checkpoint_size_gib=1")).count("there is no such claim in this namespace") == 1
    assert not (tmp_path / "applied").exists()


def test_a_name_that_another_kind_has(desk, tmp_path: Path) -> None:
    tool = tmp_path / "tools" / "kubectl"
    tool.write_text(
        KUBECTL.replace("case", 'case "$*" in *"get jobs.batch"*) echo job.batch/mine; exit 0 ;; esac\ncase', 1)
    )
    said = words(desk())
    assert "the cluster has a job of this name (jobs.batch)" in said
    assert "kubectl --namespace=team delete jobs.batch mine" in said
    assert not (tmp_path / "applied").exists()


def test_a_run_folder_that_can_only_be_read(desk, tmp_path: Path) -> None:
    (tmp_path / "claims").write_text(json.dumps(CLAIMS).replace("ReadWriteMany", "ReadOnlyMany"))
    said = words(desk())
    assert "kubernetes.checkpoint_claim = 'runs'" in said
    assert "the run writes there, and its access mode is ReadOnlyMany" in said


def test_no_cluster_is_one_sentence(desk, tmp_path: Path) -> None:
    said = 'E1123 memcache.go:265 "Unhandled Error"\n' * 5
    said += "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    (tmp_path / "error").write_text(said)
    (tmp_path / "tools" / "kubectl").write_text('#!/bin/bash\ncat "$HOME/error" >&2; exit 1\n')
    assert words(desk()) == (
        "kubectl reaches no cluster: The connection to the server localhost:8080 was refused - did you specify the "
        "right host or port?\n    fix: kubectl config get-contexts, then kubernetes.context, or KUBECONFIG; --dry-run "
        "needs no cluster"
    )


def test_a_config_whose_name_no_config_map_takes(desk, tmp_path: Path) -> None:
    (tmp_path / "..sft.yaml").write_text(CONFIG)
    done = desk("--dry-run", "config=..sft.yaml")
    assert done.returncode == 0, words(done)
    assert list(next(yaml.safe_load_all(done.stdout))["data"]) == ["sft_trainer.yaml"]


def test_what_the_server_says_is_shown(desk, tmp_path: Path) -> None:
    (tmp_path / "refuse").write_text('strict decoding error: unknown field "spec.foo"\n')
    done = desk()
    assert done.returncode == 2
    assert words(done) == 'kubectl apply failed:\n    strict decoding error: unknown field "spec.foo"'
    assert not (tmp_path / ".local").exists()


def test_a_cluster_without_the_operator(desk, tmp_path: Path) -> None:
    tool = tmp_path / "tools" / "kubectl"
    tool.write_text(
        '#!/bin/bash\necho "error: the server doesn\'t have a resource type \\"pytorchjobs\\"" >&2; exit 1\n'
    )
    assert words(desk()) == (
        "the cluster has no pytorchjobs.kubeflow.org\n"
        "    fix: install Kubeflow's training operator (v1.9), or --kind job, which needs no operator"
    )
