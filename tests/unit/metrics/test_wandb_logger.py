from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_job.metrics.loggers import BackgroundLogger
from sft_job.metrics.wandb_logger import WandbLogger
from tests.ranks import free_port

wandb = pytest.importorskip("wandb")

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key and no settings of whoever runs the tests; wandb's service ends with each test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield
    wandb.teardown()


@contextlib.contextmanager
def server(status: int) -> Iterator[str]:
    """An HTTP server that answers everything with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()


def log_two_steps(folder: Path, first: int) -> list[str]:
    """One start of a job that logs two steps; its warnings."""
    warnings: list[str] = []
    config = {"optim": {"lr": 1e-3}, "data": {"train_files": Path("train.parquet")}}
    inner = WandbLogger(folder, project="p", name="n", config=config, warn=warnings.append, init_seconds=5.0)
    logger = BackgroundLogger(inner, name="wandb", warn=warnings.append)
    for step in (first, first + 1):
        logger.log({"step": step, "train/loss": 1.0 / step, "perf/mfu": None})
    logger.close()
    return warnings


def offline_runs(folder: Path) -> list[str]:
    """Ids of the offline runs in the folder, one for each start that wrote something."""
    return [path.stem.removeprefix("run-") for path in sorted(folder.glob("offline-run-*/run-*.wandb"))]


def test_restart_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run" / "wandb"
    assert log_two_steps(folder, 1) == []
    known = (folder / "run_id").read_text().strip()
    assert log_two_steps(folder, 3) == []
    assert (folder / "run_id").read_text().strip() == known
    assert offline_runs(folder) == [known, known]
    content = b"".join(path.read_bytes() for path in folder.glob("offline-run-*/*.wandb"))
    assert b"train/loss" in content
    assert b"train.parquet" in content


def test_other_folder_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_two_steps(tmp_path / "a" / "wandb", 1)
    log_two_steps(tmp_path / "b" / "wandb", 1)
    assert offline_runs(tmp_path / "a" / "wandb") != offline_runs(tmp_path / "b" / "wandb")


def test_without_a_key_the_run_is_kept_offline(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "wandb"
    warnings = log_two_steps(folder, 1)
    assert len(warnings) == 1
    assert "no key" in warnings[0]
    assert str(folder) in warnings[0]
    assert len(offline_runs(folder)) == 1


def test_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    warnings = log_two_steps(tmp_path / "wandb", 1)
    assert len(warnings) == 1
    assert "does not answer" in warnings[0]
    assert len(offline_runs(tmp_path / "wandb")) == 1


def test_key_from_netrc_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(401) as address:
        (tmp_path / "netrc").write_text(f"machine {address.removeprefix('http://')} login user password {KEY}\n")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        warnings = log_two_steps(tmp_path / "wandb", 1)
    assert len(warnings) == 1
    assert "401" in warnings[0]
    assert len(offline_runs(tmp_path / "wandb")) == 1


def test_server_that_refuses_the_key_which_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(401) as address:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("SOME_TOKEN", "canary-5d1c")
        warnings = log_two_steps(tmp_path / "wandb", 1)
    assert len(warnings) == 1
    assert "kept offline" in warnings[0]
    assert len(offline_runs(tmp_path / "wandb")) == 1
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(KEY.encode() in content or b"canary-5d1c" in content for content in written)


def test_disabled_writes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_two_steps(tmp_path / "wandb", 1) == []
    assert offline_runs(tmp_path / "wandb") == []
