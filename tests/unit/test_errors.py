from __future__ import annotations

import pytest

from sft_job.contract import ExitCode
from sft_job.errors import JobError, Problem, ProblemsError, problems_text, raise_problems, worst_code

CONFIG = Problem(ExitCode.CONFIG, "optim.lr", "must be above 0", "try 1e-5", value=0, origin="sft_trainer.yaml:12")
DATA = Problem(ExitCode.DATA, "train.parquet", "has no column 'prompt'")
MODEL = Problem(ExitCode.MODEL, "model.partial_pretrain", "there is no such folder", value="/nowhere")


def test_a_problem_says_where_what_rule_and_fix():
    assert CONFIG.text() == "sft_trainer.yaml:12: optim.lr = 0\n    must be above 0\n    fix: try 1e-5"


def test_a_problem_without_value_origin_and_fix_is_two_lines():
    assert DATA.text() == "train.parquet\n    has no column 'prompt'"


def test_a_problem_in_one_line():
    problem = Problem(ExitCode.CONFIG, "data.val_files", "is not\nthere", "name another", "/a b", "sft.yaml:3")
    assert problem.line() == "sft.yaml:3: data.val_files = '/a b': is not there (fix: name another)"
    assert Problem(ExitCode.CONFIG, "data.val_files", "is not there").line() == "data.val_files: is not there"


def test_null_is_shown_as_a_value():
    assert Problem(ExitCode.CONFIG, "trainer.seed", "must be set", value=None).text().startswith("trainer.seed = None")


def test_a_long_value_is_cut():
    shown = Problem(ExitCode.CONFIG, "key", "rule", value="x" * 5000).text().splitlines()[0]
    assert shown.endswith("…")
    assert len(shown) < 220


@pytest.mark.parametrize(
    ("problems", "code"),
    [
        ([MODEL, DATA, CONFIG], ExitCode.CONFIG),
        ([MODEL, DATA], ExitCode.DATA),
        ([MODEL], ExitCode.MODEL),
        ([MODEL, Problem(ExitCode.CANNOT_CREATE, "folder", "is read-only")], ExitCode.MODEL),
        ([Problem(ExitCode.CANNOT_CREATE, "folder", "is read-only")], ExitCode.CANNOT_CREATE),
    ],
)
def test_configuration_comes_before_data_before_model(problems: list[Problem], code: ExitCode):
    assert worst_code(problems) is code


def test_all_problems_stand_under_one_count():
    text = problems_text([CONFIG, MODEL])
    assert text.startswith("2 problems:\n")
    assert "optim.lr" in text
    assert "/nowhere" in text
    assert problems_text([CONFIG]).startswith("1 problem:\n")


def test_raise_problems_raises_them_together():
    raise_problems([])
    with pytest.raises(ProblemsError, match="2 problems") as caught:
        raise_problems([MODEL, DATA])
    assert caught.value.code is ExitCode.DATA
    assert caught.value.problems == (MODEL, DATA)
    assert isinstance(caught.value, JobError)


def test_an_error_without_problems_is_a_mistake():
    with pytest.raises(ValueError, match="at least one"):
        ProblemsError([])
