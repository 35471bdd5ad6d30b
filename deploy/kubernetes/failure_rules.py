"""What a Job's ``podFailurePolicy`` makes of each end of a pod, as Kubernetes reads it: the first rule that fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.kubernetes.pod_rules import Found
from deploy.kubernetes.pods import Node
from deploy.kubernetes.render import PERMANENT
from sft_job.contract import ExitCode

_DISRUPTED = "DisruptionTarget"
_RETRIED = (int(ExitCode.LOST), int(ExitCode.STOPPED))


def check_failure_rules(spec: Node, path: str, check: Found) -> None:
    """Refuse a Job that ends, or starts again, after the wrong ends of its pods.

    Args:
        spec: the Job's.
        path: where it stands.
        check: takes the problems.
    """
    pod = spec["template"]["spec"]
    rule = "podFailurePolicy sees exit codes only of pods that are never started again in place"
    check(pod.get("restartPolicy") == "Never", f"{path}.template.spec.restartPolicy", rule, "restartPolicy: Never")
    rule, fix = "ends the job for good, its later starts included", "activeDeadlineSeconds of the pods"
    check("activeDeadlineSeconds" not in spec, f"{path}.activeDeadlineSeconds", rule, fix)
    replaced = spec.get("podReplacementPolicy", "Failed") == "Failed"
    check(replaced, f"{path}.podReplacementPolicy", "must be Failed where there is a podFailurePolicy")
    path = f"{path}.podFailurePolicy"
    rules = spec.get("podFailurePolicy", {"rules": []})["rules"]
    names = [each["name"] for each in pod["containers"]]
    for at, each in enumerate(rules):
        one = ("onExitCodes" in each) != ("onPodConditions" in each)
        check(one, f"{path}.rules[{at}]", "must have one of onExitCodes and onPodConditions")
        named = each.get("onExitCodes", {}).get("containerName")
        rule = f"there is no container {named}, so the rule never fits"
        check(named is None or named in names, f"{path}.rules[{at}].onExitCodes.containerName", rule)
    container = names[0] if names else ""
    endless = [code for code in PERMANENT if _action(rules, container, code, False) != "FailJob"]
    rule = (
        f"after {', '.join(map(str, endless))} the job would start again and end the same way: the first rule that fits"
    )
    check(not endless, path, rule, f"FailJob first, In {', '.join(map(str, PERMANENT))}")
    lost = [code for code in _RETRIED if _action(rules, container, code, False) == "FailJob"]
    check(
        not lost, path, f"after {', '.join(map(str, lost))} the job must go on, and the first rule that fits fails it"
    )
    spared = all(_action(rules, container, code, True) == "Ignore" for code in (*_RETRIED, None))
    check(spared, path, "pods that make room for others must not count", f"Ignore on {_DISRUPTED}")


def _action(rules: Sequence[Node], container: str, code: int | None, disrupted: bool) -> str:
    """What becomes of a pod that ended so: the first rule that fits, or it counts."""
    fitting = (each["action"] for each in rules if _fits(each, container, code, disrupted))
    return next(fitting, "Count")


def _fits(rule: Node, container: str, code: int | None, disrupted: bool) -> bool:
    codes: Any = rule.get("onExitCodes")
    if codes is not None:
        if code is None or codes.get("containerName", container) != container:
            return False
        return (code in codes["values"]) == (codes["operator"] == "In")
    return any(
        each["type"] == _DISRUPTED and (each.get("status", "True") == "True") == disrupted
        for each in rule.get("onPodConditions", [])
    )
