"""wandb as a logger. It is imported and started with the first record: on the thread that hands it over.

Whether it syncs is decided in bounded time. Without a key, or where its server does not answer, the run is kept
offline in the run folder; ``wandb sync`` uploads it later. The key is only ever read by wandb itself.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft_job.errors import shorten

DEFAULT_SERVER = "https://api.wandb.ai"


class WandbLogger:
    """One wandb run; a restart of the job goes on with the same run.

    Args:
        folder: wandb's files and ``run_id``, the file that holds the run's id.
        project: wandb's project.
        name: the run's name.
        config: resolved settings.
        warn: takes the text of a warning.
        connect_seconds: longest wait to see whether the server answers.
        init_seconds: longest wait for the run to start at the server.
        finish_seconds: longest wait for uploads at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        connect_seconds: float = 5.0,
        init_seconds: float = 20.0,
        finish_seconds: float = 20.0,
    ) -> None:
        self._folder = folder
        self._project = project
        self._name = name
        self._config = config
        self._warn = warn
        self._connect_seconds = connect_seconds
        self._init_seconds = init_seconds
        self._finish_seconds = finish_seconds
        self._run: Any = None
        self._started = False

    @property
    def longest_close(self) -> float:
        """Seconds after which a ``close`` that has not come back never will."""
        return self._connect_seconds + self._init_seconds + self._finish_seconds + 10

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record; the first one starts the run. Null values are left out.

        Raises:
            Exception: whatever wandb raises; it is used through ``BackgroundLogger``.
        """
        if not self._started:
            self._started = True  # before the attempt: a start that failed is not tried again at every step
            self._run = self._start()
        if self._run is not None:
            values = {key: value for key, value in record.items() if value is not None}
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    def _start(self) -> Any:
        mode = os.environ.get("WANDB_MODE") or self._choose_mode()
        try:
            return self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(f"wandb: {_one_line(error)}: this run is kept offline in {self._folder}")
            _stop_service()  # it holds the run's id from the failed attempt
            return self._init("offline")

    def _choose_mode(self) -> str:
        server = os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER
        if not _has_key(server):
            why = "no key (WANDB_API_KEY, or wandb login)"
        elif not _answers(server, self._connect_seconds):
            why = f"{server} does not answer"
        else:
            return "online"
        self._warn(f"wandb: {why}: this run is kept offline in {self._folder} (upload it with wandb sync)")
        return "offline"

    def _init(self, mode: str) -> Any:
        import wandb  # noqa: PLC0415  optional and slow to import

        self._folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))
        return wandb.init(
            project=self._project,
            name=self._name,
            id=_run_id(self._folder),
            resume="allow" if mode == "online" else None,  # offline wandb warns that it does not look
            mode=mode,  # pyright: ignore[reportArgumentType]  whatever WANDB_MODE says
            dir=str(self._folder.parent),  # wandb adds wandb/ itself
            config=json.loads(json.dumps(self._config, default=str)),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=self._init_seconds,
                finish_timeout=self._finish_seconds,
            ),
        )


def _stop_service() -> None:
    import wandb  # noqa: PLC0415  optional and slow to import

    wandb.teardown()


def _run_id(folder: Path) -> str:
    """The run's id: from the file, or a new one that is written there."""
    path = folder / "run_id"
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    fresh = secrets.token_hex(4)
    draft = folder / f".run_id.{os.getpid()}"
    draft.write_text(fresh + "\n", encoding="utf-8")
    draft.replace(path)
    return fresh


def _has_key(server: str) -> bool:
    """Whether wandb would find credentials, without a look at them and without its login prompt."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(server: str, seconds: float) -> bool:
    """Whether something accepts connections at the server, or at the proxy that leads to it."""
    scheme = urlsplit(server).scheme
    proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme}_proxy".upper())
    target = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy else server)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        with socket.create_connection((target.hostname or "", port), timeout=seconds):
            return True
    except OSError:
        return False


def _one_line(error: Exception) -> str:
    return shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)
