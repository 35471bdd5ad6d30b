from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.check import check_job
from sft_job.contract import ExitCode
from tests.tiny import CHATML, save_model, write_rows

Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """``check(*overrides)`` of a small job: the exit code, what it said, its errors."""
    monkeypatch.setenv("COLUMNS", "1000")
    model, rows = save_model(tmp_path / "model"), write_rows(tmp_path / "train.parquet", 8)

    config = tmp_path / "config.yaml"
    config.write_text("data: {train_batch_size: 4}\n")

    def run(*overrides: str) -> tuple[int, str, str]:
        settings = [
            f"model.partial_pretrain={model}",
            f"data.train_files={rows}",
            f"trainer.default_local_dir={tmp_path / 'run'}",
            "trainer.logger=[console]",
            "trainer.total_epochs=1",
            *overrides,
        ]
        capsys.readouterr()
        code = check_job(str(config), settings, {"NPROC_PER_NODE": "1"})
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_template_has_a_line(check: Check, tmp_path: Path) -> None:
    code, out, err = check()
    assert (code, err) == (ExitCode.DONE, "")
    (line,) = [line for line in out.splitlines() if line.startswith("template")]
    assert "a turn ends with '<|im_end|>' (id 2), trained once; generation stops at it; control tokens in" in line
    template = tmp_path / "broken.jinja"
    template.write_text(CHATML.replace("add_generation_prompt", "never"))
    code, out, err = check(f"data.chat_template={template}")
    assert code == ExitCode.CONFIG
    assert err.startswith("1 problem:\ndata.chat_template\n    writes no generation prompt: ")
    template.write_text("{{ raise_exception('no') }}")
    code, out, err = check(f"data.chat_template={template}")
    assert code == ExitCode.CONFIG
    assert err.startswith("1 problem:\n")


def test_the_template_is_tested_for_the_validation_sets_too(check: Check, tmp_path: Path) -> None:
    # Rows of a prompt and a response need no token behind any answer but the last.
    template = tmp_path / "one_end.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
    )
    rows = tmp_path / "val.parquet"
    turns = [{"role": "user", "content": "walk"}, {"role": "assistant", "content": "node"}]
    pq.write_table(pa.table({"messages": [turns] * 4}), rows)
    talks = f"data.val_files={{talks: {{files: {rows}, multiturn: {{enable: true}}}}}}"
    assert check(talks)[0] == ExitCode.DONE
    assert check(f"data.chat_template={template}")[0] == ExitCode.DONE
    code, _, err = check(talks, f"data.chat_template={template}")
    assert code == ExitCode.CONFIG
    assert "only the last answer is ended by" in err


def test_a_day_may_be_written_as_yaml_writes_it(check: Check, tmp_path: Path) -> None:
    template = tmp_path / "today.jinja"
    template.write_text("{% if false %}{{ strftime_now('%Y') }}{% endif %}" + CHATML)
    code, _, err = check(f"data.chat_template={template}")
    assert code == ExitCode.CONFIG
    assert "strftime_now" in err
    day = "data.apply_chat_template_kwargs={strftime_now: 2024-07-26}"
    assert check(f"data.chat_template={template}", day)[0] == ExitCode.DONE
