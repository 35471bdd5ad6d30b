"""kubectl: the one way to the cluster. It knows people's contexts and logins, and validates strictly on the server.

The Python client is not used: it drops unknown fields unless told otherwise, and would have to be taught each login.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, cast

from sft_job.contract import ExitCode
from sft_job.errors import JobError

_SECONDS = 120
_NO_SERVER = re.compile(
    r"connection to the server|[Uu]nable to connect to the server|dial tcp|couldn't get current server API group list"
    r"|context .* does not exist|context was not found|no configuration has been provided",
)


class Kubectl:
    """kubectl on one context and namespace.

    Args:
        context: None = its present one.
        namespace: None = that of the context.
    """

    def __init__(self, context: str | None, namespace: str | None) -> None:
        self._namespace = namespace
        self._options = [
            *([] if context is None else [f"--context={context}"]),
            *([] if namespace is None else [f"--namespace={namespace}"]),
        ]

    def line(self, *arguments: str) -> str:
        """A command line for people."""
        return shlex.join(["kubectl", *self._options, *arguments])

    def namespace(self) -> str:
        """The namespace in which objects are made."""
        if self._namespace is not None:
            return self._namespace
        try:
            found = self._asked(["config", "view", "--minify", "--output=jsonpath={..namespace}"]).strip()
        except JobError:  # no such file: in a pod
            found = ""
        return found if re.fullmatch(r"[a-z0-9-]{1,63}", found) else "default"

    def exists(self, resource: str, name: str) -> bool:
        """Whether there is such an object.

        Raises:
            JobError: the cluster does not answer, or has no such resource (2).
        """
        return bool(self._asked(["get", resource, name, "--output=name", "--ignore-not-found"]).strip())

    def objects(self, resource: str, names: Sequence[str]) -> dict[str, Any] | None:
        """Name -> object, of those that are there; None where we may not look."""
        try:
            text = self._asked(["get", resource, *names, "--output=json", "--ignore-not-found"])
        except JobError:
            return None
        if not text.strip():
            return {}
        found = cast("dict[str, Any]", json.loads(text))
        items = found["items"] if found.get("kind") == "List" else [found]
        return {each["metadata"]["name"]: each for each in items}

    def apply(self, manifest: str) -> list[str]:
        """Apply objects on the server, which refuses unknown fields; a line for each.

        Raises:
            JobError: the server refused them, or does not answer (2).
        """
        arguments = ["apply", "--server-side", "--field-manager=sft-job", "--validate=strict", "--filename=-"]
        return self._asked(arguments, manifest).splitlines()

    def _asked(self, arguments: Sequence[str], given: str | None = None) -> str:
        program = shutil.which("kubectl")
        if program is None:
            fix = "install kubectl 1.27 or later; --dry-run writes the manifests without it"
            raise JobError(ExitCode.CONFIG, f"kubectl is not on PATH\n    fix: {fix}")
        command = [program, *self._options, *arguments]
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise JobError(ExitCode.CONFIG, f"kubectl does not answer: {error}") from error
        if done.returncode != 0:
            if _NO_SERVER.search(done.stderr):
                last = done.stderr.strip().splitlines()[-1]
                fix = "kubectl config get-contexts, then kubernetes.context, or KUBECONFIG; --dry-run needs no cluster"
                raise JobError(ExitCode.CONFIG, f"kubectl reaches no cluster: {last}\n    fix: {fix}")
            lines = "".join(f"\n    {line}" for line in done.stderr.strip().splitlines()[-20:])
            raise JobError(ExitCode.CONFIG, f"kubectl {arguments[0]} failed:{lines}")
        return done.stdout
