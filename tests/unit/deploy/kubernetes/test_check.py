from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy.kubernetes.check import check_manifests
from deploy.kubernetes.ready import FOLDER
from deploy.kubernetes.render import KINDS
from tests.unit.deploy.kubernetes.mutations import CANARY, MUTATIONS, Mutation, good


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 16])
def test_what_is_rendered_is_good(kind: str, nodes: int) -> None:
    assert check_manifests(good(kind, f"resources.nodes={nodes}")) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutated_manifest_is_refused(mutation: Mutation) -> None:
    problems = check_manifests(mutation.documents())
    assert problems
    assert not any(CANARY in problem.text() for problem in problems)


@pytest.mark.parametrize("kind", KINDS)
def test_every_misspelt_field_is_refused(kind: str) -> None:
    """Each field of each object, with its last letter twice; names that people choose stay."""
    documents = good(kind)
    free = ("labels", "annotations", "selector", "limits", "requests", "nodeSelector", "data")

    def visit(at: Any, free_here: bool) -> int:
        count = 0
        for name in list(at) if isinstance(at, dict) else range(len(at)):
            each = at[name]
            if isinstance(at, dict) and not free_here:
                changed = {f"{key}{key[-1]}" if key == name else key: value for key, value in at.items()}
                before = dict(at)
                at.clear()
                at.update(changed)
                assert check_manifests(documents), name
                at.clear()
                at.update(before)
                count += 1
            if isinstance(each, dict | list):
                count += visit(each, name in free)
        return count

    assert sum(visit(each, False) for each in documents) > 100


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
        max_leaves=8,
    )
)
def test_any_document_is_looked_at(document: Any) -> None:
    assert (check_manifests([document]) == []) == (document is None)


@given(st.data())
def test_any_value_in_any_place_is_looked_at(data: st.DataObject) -> None:
    documents = good(data.draw(st.sampled_from(sorted(KINDS))))
    at: Any = documents
    while True:
        name = data.draw(st.sampled_from(range(len(at)) if isinstance(at, list) else sorted(at)))
        inner = isinstance(at[name], dict | list) and at[name] and data.draw(st.booleans())
        if not inner:
            break
        at = at[name]
    at[name] = data.draw(st.sampled_from([None, 1, -1, "", "x", [], {}, [{}], {"a": 1}, True, 1.5]))
    for problem in check_manifests(documents):
        assert problem.text()


def test_what_is_said() -> None:
    documents = good("pytorchjob")
    box = documents[2]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    box["imag"] = box.pop("image")
    assert [problem.text() for problem in check_manifests(documents)] == [
        "PyTorchJob sft.spec.pytorchReplicaSpecs.Master.template.spec.containers[0].imag\n"
        "    unknown field, or one that a job of ours must not have\n    fix: did you mean image?",
        "PyTorchJob sft.spec.pytorchReplicaSpecs.Master.template.spec.containers[0].image\n    is missing",
    ]


def test_files_that_people_edit_are_looked_at() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "job" / "job.yaml").read_text()))
    assert check_manifests(documents) == []
