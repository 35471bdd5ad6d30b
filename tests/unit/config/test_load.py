from __future__ import annotations

from pathlib import Path

import pytest

from sft_job.config.keys import KEYS
from sft_job.config.load import Loaded, dump_config, load_config, load_resolved, origins_text, run_folder
from sft_job.config.schema import DataConfig, JobConfig, TrainerConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem, ProblemsError

SEED = Path(__file__).parents[2] / "golden" / "seed_sft_trainer.yaml"
RUNS = {"CHECKPOINT_DIR": "/runs"}


def load(tmp_path: Path, text: str | bytes, *overrides: str, environ: dict[str, str] | None = None) -> Loaded:
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(str(path), overrides, RUNS if environ is None else environ)


def texts(loaded: Loaded) -> list[str]:
    assert all(problem.code is ExitCode.CONFIG for problem in loaded.problems)
    return [problem.text() for problem in loaded.problems]


def only(loaded: Loaded) -> Problem:
    assert len(loaded.problems) == 1, texts(loaded)
    return loaded.problems[0]


# Finding the file


def test_the_seed_loads_as_it_is():
    loaded = load_config(str(SEED), [], {})
    assert texts(loaded) == []
    assert (loaded.mappings, loaded.ignored, loaded.path) == ([], [], SEED)
    config = loaded.config
    assert (config.data.train_batch_size, config.data.micro_batch_size_per_gpu) == (8, 1)
    assert (config.optim.lr, config.optim.betas, config.optim.warmup_steps_ratio) == (1e-5, [0.9, 0.95], 0.1)
    assert config.trainer.logger == ["console", "wandb"]
    assert config.model.fsdp_config.model_dtype == "bf16"
    assert run_folder(config).root == Path("/path/to/your/checkpoints/sft")


@pytest.mark.parametrize("by_argument", [True, False])
@pytest.mark.parametrize("name", [None, "other.yaml"])
def test_a_folder_with_the_config(tmp_path: Path, by_argument: bool, name: str | None):
    (tmp_path / (name or "sft_trainer.yaml")).write_text("trainer: {seed: 7}")
    environ = RUNS | ({} if name is None else {"CONFIG_NAME": name})
    environ |= {"CONFIG_PATH": "/nowhere" if by_argument else str(tmp_path)}
    loaded = load_config(str(tmp_path) if by_argument else None, [], environ)
    assert texts(loaded) == []
    assert loaded.config.trainer.seed == 7


def test_config_path_may_name_the_file(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer: {seed: 7}")
    loaded = load_config(None, [], RUNS | {"CONFIG_PATH": str(tmp_path / "a.yaml"), "CONFIG_NAME": "b.yaml"})
    assert loaded.config.trainer.seed == 7


@pytest.mark.parametrize(
    ("argument", "environ", "said"),
    [
        (None, {}, ["CONFIG_PATH is not set, and the command line names no file"]),
        (None, {"CONFIG_PATH": "{}/nowhere"}, ["CONFIG_PATH = ", "there is no such file or folder"]),
        ("{}/sft_trainer.yml", {}, ["command line: CONFIG", "there is sft_trainer.yaml.bak, sft.yaml"]),
        ("{}", {}, ["looked for {}/sft_trainer.yaml", "there is sft_trainer.yaml.bak, sft.yaml", "set CONFIG_NAME"]),
        ("{}", {"CONFIG_NAME": "job"}, ["looked for {}/job", "there is sft.yaml"]),
        ("nul\0byte", {}, ["CONFIG"]),
        ("x" * 5000, {}, ["CONFIG"]),
    ],
)
def test_a_config_that_is_not_there(tmp_path: Path, argument: str | None, environ: dict[str, str], said: list[str]):
    for name in ("sft_trainer.yaml.bak", "sft.yaml", "data.parquet"):
        (tmp_path / name).touch()
    filled = {name: value.format(tmp_path) for name, value in environ.items()}
    loaded = load_config(argument and argument.format(tmp_path), [], filled)
    text = only(loaded).text()
    assert all(each.format(tmp_path) in text for each in said), text
    assert (loaded.path, loaded.readable) == (None, False)


# Files that are no YAML


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", None, "holds no settings"),
        (b"# only a comment\n", None, "holds no settings"),
        (b"null\n", None, "holds no settings"),
        (b"data:\n\ttrain_batch_size: 1\n", 2, "tabs indent line 2; YAML indents with spaces"),
        (b"data:\n\ttrain_batch_size: 1\n\tmax_length: 3\n", 2, "tabs indent lines 2, 3;"),
        (b"data: {a\n", 1, "is no YAML"),
        (b"data:\n  a: b: c\n", 2, "is no YAML"),
        (b"data: {}\n---\nmodel: {}\n", 2, "but found another document"),
        (b"data:\n  max_length: 1\0\n", 2, "unprintable character U+0000"),
        (b"trainer:\n  project_name: \xff\n", 2, "not UTF-8 text: byte 0xff"),
        ("data: {}\n".encode("utf-16"), 1, "UTF-16"),
        (b"data: " + b"[" * 100_000, 1, "nested more than 50 levels deep"),
        (b"data: &a\n  multiturn: *a\n", 1, "an alias contains itself"),
        (b"# " + b"x" * 1_000_001, None, "larger than 1,000,000 bytes"),
        (
            b"data:\n  train_files:\n    - &a [x, x, x, x, x, x, x, x, x, x]\n"
            + b"".join(b"    - &%c [%s]\n" % (98 + i, b", ".join([b"*%c" % (97 + i)] * 10)) for i in range(9)),
            None,
            "aliases expand it",
        ),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, line: int | None, said: str):
    loaded = load(tmp_path, content)
    problem = only(loaded)
    assert said in problem.rule
    assert problem.subject == str(tmp_path / "job.yaml")
    if line is not None:
        assert problem.origin == f"job.yaml:{line}"
    assert not loaded.readable


@pytest.mark.parametrize(
    ("content", "said"), [("- data\n", "this is a list"), ("hello\n", "this is the value 'hello'")]
)
def test_a_root_that_is_no_mapping(tmp_path: Path, content: str, said: str):
    loaded = load(tmp_path, content)
    problem = only(loaded)
    assert (problem.subject, problem.origin) == ("the config", "job.yaml:1")
    assert said in problem.rule
    assert not loaded.readable


def test_a_byte_order_mark_is_no_error(tmp_path: Path):
    loaded = load(tmp_path, b"\xef\xbb\xbftrainer: {seed: 7}")
    assert texts(loaded) == []
    assert loaded.config.trainer.seed == 7


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may open everything
    assert "cannot be read: Permission denied" in only(load_config(str(SEED), [], {})).rule


# Single keys: YAML text, line of the problem, subject, and what the message says

WRONG_KEYS = [
    ("dat:\n  max_length: 3", 1, "dat", "did you mean data?"),
    ("data:\n  max_lenght: 3", 2, "data.max_lenght", "did you mean data.max_length?"),
    ("data:\n  multiturn:\n    enabel: true", 3, "data.multiturn.enabel", "did you mean data.multiturn.enable?"),
    ("max_length: 3", 1, "max_length", "did you mean data.max_length?"),
    ("data:\n  lr: 3", 2, "data.lr", "did you mean optim.lr?"),
    ("data.max_length: 3", 1, "data.max_length", "a key with dots"),
    ("multiturn:\n  enable: true", 1, "multiturn", "it belongs below data, as data.multiturn"),
    ("lora_rank: 16", 1, "lora_rank", "as model.lora_rank"),
    ("lora_alpha: 32", 1, "lora_alpha", "as model.lora_alpha"),
    ("target_modules: all-linear", 1, "target_modules", "as model.target_modules"),
    ("fsdp_config:\n  cpu_offload: true", 1, "fsdp_config", "as model.fsdp_config"),
    ("optim:\n  lr: 1\n  eps: 1\n  lr: 2", 4, "optim.lr", "duplicate key; the first one is at job.yaml:2"),
    ("data: {}\nmodel: {}\ndata: {}", 3, "data", "duplicate key; the first one is at job.yaml:1"),
    ("3: 4", 1, "3", "unknown key"),
    ("? [a, b]\n: 1", 1, "the config", "keys must be plain names"),
    ("<<: 3\n", 1, "the config", "for merging"),
    ("data: 5", 1, "data", "must be a mapping of settings; this is the value '5'"),
    ("data:\n  multiturn: [a]", 2, "data.multiturn", "must be a mapping of settings; this is a list"),
]
WRONG_VALUES = [
    ("data:\n  max_length: abc", 2, "data.max_length", "must be a whole number; this is a text"),
    ("data:\n  max_length: 1.5", 2, "data.max_length", "must be a whole number; this is a number"),
    ("data:\n  max_length: 1e3", 2, "data.max_length", "write 1000"),
    ("data:\n  max_length: true", 2, "data.max_length", "this is true or false"),
    ("data:\n  max_length: null", 2, "data.max_length", "null is not allowed"),
    ("data:\n  max_length:", 2, "data.max_length", "null is not allowed"),
    ("data:\n  max_length: {a: 1}", 2, "data.max_length", "this is a mapping"),
    ("data:\n  max_length: [1]", 2, "data.max_length", "this is a list"),
    ("data:\n  max_length: 010", 2, "data.max_length", "YAML reads 010 as 8 (octal)"),
    ("data:\n  max_length: 12:30", 2, "data.max_length", "YAML reads 12:30 as 750 (base 60)"),
    ("data:\n  max_length: 0b_", 2, "data.max_length", "cannot be read"),
    ("data:\n  max_length: " + "9" * 5000, 2, "data.max_length", "cannot be read"),
    ("data:\n  truncation: no", 2, "data.truncation", "YAML reads no as false"),
    ("data:\n  truncation: true", 2, "data.truncation", "YAML reads true as true"),
    ("data:\n  truncation: 012", 2, "data.truncation", "YAML reads 012 as 10"),
    ("data:\n  truncation: [left]", 2, "data.truncation", "must be a text; this is a list"),
    ("data:\n  prompt_key: yes", 2, "data.prompt_key", "YAML reads yes as true"),
    ("data:\n  use_dynamic_bsz: maybe", 2, "data.use_dynamic_bsz", "must be true or false; this is a text"),
    ("optim:\n  lr: fast", 2, "optim.lr", "must be a number; this is a text"),
    ("optim:\n  lr: 1:30.5", 2, "optim.lr", "YAML reads 1:30.5 as 90.5 (base 60)"),
    ("optim:\n  betas: 0.9", 2, "optim.betas", "write [0.9]"),
    ("optim:\n  betas:\n    - 0.9\n    - big", 4, "optim.betas[1]", "must be a number; this is a text"),
    ("optim:\n  betas:\n    - 0.9\n    - 1:30", 4, "optim.betas[1]", "base 60"),
    ("optim:\n  warmup_steps: x", 2, "optim.warmup_steps", "must be a whole number or null; this is a text"),
    ("trainer:\n  logger: console", 2, "trainer.logger", "write [console]"),
    ("trainer:\n  logger: [console, null]", 2, "trainer.logger[1]", "null is not allowed"),
    ("trainer:\n  logger: [console, on]", 2, "trainer.logger[1]", "YAML reads on as true"),
    ("trainer:\n  project_name: !!python/name:os.system x", 2, "trainer.project_name", "the tag !!python/name:os.sys"),
    ("trainer:\n  project_name: !mine x", 2, "trainer.project_name", "the tag !mine is not allowed"),
    ("trainer:\n  project_name: !!binary eA==", 2, "trainer.project_name", "the tag !!binary"),
    ("trainer:\n  seed: !!int x", 2, "trainer.seed", "cannot be read"),
    ("trainer:\n  project_name: ${", 2, "trainer.project_name", "no viable alternative"),
    ("trainer:\n  project_name: ${oc.env:SFT_NOT_SET}", 2, "trainer.project_name", "'SFT_NOT_SET' not found"),
    ("trainer:\n  project_name: ${nowhere.at.all}", 2, "trainer.project_name", "cannot be resolved"),
    ("trainer:\n  project_name: ${trainer.project_name}", 2, "trainer.project_name", "Recursive interpolation"),
    ("trainer:\n  seed: ${trainer.project_name}", 2, "trainer.seed", "cannot be resolved"),
    ("trainer:\n  project_name: ${unknown_resolver:1}", 2, "trainer.project_name", "cannot be resolved"),
    ("model:\n  partial_pretrain: ???", 2, "model.partial_pretrain", "must be filled in"),
    ("data:\n  train_files: ['${oc.env:SFT_NOT_SET}']", 2, "data.train_files", "not found"),
    ("data:\n  apply_chat_template_kwargs: {1: 2}", 2, "data.apply_chat_template_kwargs", "must be a mapping"),
    ("data:\n  apply_chat_template_kwargs: 3", 2, "data.apply_chat_template_kwargs", "must be a mapping"),
]


@pytest.mark.parametrize(("text", "line", "subject", "said"), [*WRONG_KEYS, *WRONG_VALUES])
def test_a_wrong_key_or_value(tmp_path: Path, text: str, line: int, subject: str, said: str):
    problem = only(load(tmp_path, text))
    assert problem.subject == subject
    assert problem.origin == f"job.yaml:{line}"
    assert said in problem.text()


def test_all_problems_at_once_each_with_its_line(tmp_path: Path):
    cases = [case for case in WRONG_KEYS if case[2].startswith(("max_l", "lora", "target", "fsdp"))]
    cases += [
        ("trainer:\n  seeds: 1", 2, "trainer.seeds", ""),
        ("optim:\n  lr: x", 2, "optim.lr", ""),
        ("ulysses_sequence_parallel_size: x", 1, "ulysses_sequence_parallel_size", ""),
    ]
    text, expected = "", set[tuple[str, str]]()
    for part, line, subject, _ in cases:
        expected.add((subject, f"job.yaml:{text.count(chr(10)) + line}"))
        text += part + "\n"
    loaded = load(tmp_path, text, "a", "optim.eps=x", "trainer.sead=2")
    expected |= {("override", "command line"), ("optim.eps", "command line"), ("trainer.sead", "command line")}
    assert {(problem.subject, problem.origin) for problem in loaded.problems} == expected
    assert len(loaded.problems) == len(expected)


def test_a_faulty_setting_keeps_its_default_and_the_rest_is_read(tmp_path: Path):
    loaded = load(tmp_path, "optim: {lr: x, betas: [1, y], eps: 0.5}\ntrainer: {seed: 7}")
    assert len(loaded.problems) == 2
    assert (loaded.config.optim.lr, loaded.config.optim.betas) == (1e-5, [0.9, 0.95])
    assert (loaded.config.optim.eps, loaded.config.trainer.seed) == (0.5, 7)


# Values that are fine


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("'1e-5'", 1e-5),
        ("1E-5", 1e-5),
        (".5", 0.5),
        ("2", 2.0),
        ("1_0.5", 10.5),
    ],
)
def test_numbers_as_omegaconf_reads_them(tmp_path: Path, text: str, value: float):
    loaded = load(tmp_path, f"optim:\n  lr: {text}")
    assert texts(loaded) == []
    assert loaded.config.optim.lr == value


@pytest.mark.parametrize(("text", "value"), [("'12'", 12), ("0x1F", 31), ("1_000", 1000), ("-3", -3), ("0", 0)])
def test_whole_numbers(tmp_path: Path, text: str, value: int):
    loaded = load(tmp_path, f"trainer:\n  seed: {text}")
    assert (texts(loaded), loaded.config.trainer.seed) == ([], value)


@pytest.mark.parametrize(
    ("text", "value"), [("'no'", "no"), ("'010'", "010"), ("42", "42"), ("2024-01-01", "2024-01-01")]
)
def test_texts(tmp_path: Path, text: str, value: str):
    loaded = load(tmp_path, f"trainer:\n  project_name: {text}")
    assert (texts(loaded), loaded.config.trainer.project_name) == ([], value)


@pytest.mark.parametrize(("text", "value"), [("no", False), ("on", True), ("True", True), ("1", True)])
def test_booleans(tmp_path: Path, text: str, value: bool):
    loaded = load(tmp_path, f"use_remove_padding: {text}")
    assert (texts(loaded), loaded.config.use_remove_padding) == ([], value)


def test_empty_sections_anchors_and_merge_keys(tmp_path: Path):
    loaded = load(
        tmp_path,
        "data: &rows\n  prompt_key: q\n  multiturn:\noptim:\n  betas: [&b 0.8, *b]\n"
        "trainer:\n  <<: {seed: 7, log_freq: 2}\n  log_freq: 3\n",
    )
    assert texts(loaded) == []
    assert loaded.config.optim.betas == [0.8, 0.8]
    assert (loaded.config.trainer.seed, loaded.config.trainer.log_freq) == (7, 3)
    assert loaded.origin("trainer.seed") == "job.yaml:7"


def test_interpolations_are_resolved_but_saved_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SFT_SECRET", "hunter2")
    text = (
        "trainer: {project_name: '${oc.env:SFT_SECRET}', experiment_name: 'x-${trainer.seed}', "
        "seed: '${data.max_length}'}\ndata: {train_files: ['${oc.env:SFT_SECRET}/a.parquet'], max_length: 33}"
    )
    loaded = load(tmp_path, text)
    assert texts(loaded) == []
    assert (loaded.config.trainer.project_name, loaded.config.trainer.seed) == ("hunter2", 33)
    assert loaded.config.trainer.experiment_name == "x-33"
    assert loaded.config.data.train_files == ["hunter2/a.parquet"]
    assert "hunter2" not in dump_config(loaded)
    assert "hunter2" not in origins_text(loaded)
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(loaded))
    assert load_resolved(saved) == loaded.config
    monkeypatch.delenv("SFT_SECRET")
    with pytest.raises(ProblemsError, match="'SFT_SECRET' not found"):
        load_resolved(saved)


# Layers


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path):
    text = "trainer:\n  default_local_dir: /file\n  seed: 1\n"
    in_file = load(tmp_path, text, environ={})
    assert run_folder(in_file.config).root == Path("/file")
    assert in_file.origin("trainer.default_local_dir") == "job.yaml:2"
    in_environ = load(tmp_path, text, environ=RUNS)
    assert run_folder(in_environ.config).root == Path("/runs/sft")
    assert in_environ.origin("trainer.default_local_dir") == "environment CHECKPOINT_DIR"
    on_line = load(tmp_path, text, "trainer.default_local_dir=/line", environ=RUNS)
    assert run_folder(on_line.config).root == Path("/line")
    assert on_line.origin("trainer.default_local_dir") == "command line"


def test_a_run_without_a_folder(tmp_path: Path):
    for text in ("trainer: {seed: 1}", "trainer: {default_local_dir: ''}", "trainer: {default_local_dir: null}"):
        problem = only(load(tmp_path, text, environ={"CHECKPOINT_DIR": ""}))
        assert problem.subject == "trainer.default_local_dir"
        assert "neither CHECKPOINT_DIR nor trainer.default_local_dir is set" in problem.rule
    with pytest.raises(ValueError, match="default_local_dir"):
        run_folder(JobConfig())


def test_a_relative_run_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, "trainer: {seed: 1}", environ={"CHECKPOINT_DIR": "runs"})
    assert run_folder(loaded.config).root == tmp_path / "runs" / "sft"


def test_an_unexpanded_checkpoint_dir(tmp_path: Path):
    problem = only(load(tmp_path, "trainer: {seed: 1}", environ={"CHECKPOINT_DIR": "/x/${oc.env:HOME}"}))
    assert (problem.subject, problem.origin) == ("CHECKPOINT_DIR", "environment")


def test_a_checkpoint_dir_that_is_no_utf8(tmp_path: Path):
    problem = only(load(tmp_path, "trainer: {seed: 1}", environ={"CHECKPOINT_DIR": "/x\udcff"}))
    assert problem.subject == "trainer.default_local_dir"
    assert (problem.rule, problem.origin) == ("is not UTF-8 text", "environment CHECKPOINT_DIR")


def test_overrides_are_read_as_yaml(tmp_path: Path):
    loaded = load(
        tmp_path,
        "trainer: {seed: 1}\ndata: {apply_chat_template_kwargs: {a: 1}}",
        "trainer.seed=2",
        "trainer.seed=3",
        "optim.betas=[0.5, 0.6]",
        "data.val_files=",
        "data.multiturn={messages_key: chat, tools_key: t}",
        "model.partial_pretrain=/a=b",
        "trainer.experiment_name='no'",
        "data.apply_chat_template_kwargs.enable_thinking=false",
    )
    assert texts(loaded) == []
    config = loaded.config
    assert (config.trainer.seed, config.optim.betas, config.data.val_files) == (3, [0.5, 0.6], None)
    assert (config.data.multiturn.messages_key, config.data.multiturn.tools_key) == ("chat", "t")
    assert (config.model.partial_pretrain, config.trainer.experiment_name) == ("/a=b", "no")
    assert config.data.apply_chat_template_kwargs == {"a": 1, "enable_thinking": False}
    assert "data.apply_chat_template_kwargs = {'a': 1, 'enable_thinking': False}" in origins_text(loaded)
    assert "(job.yaml:2, command line)" in origins_text(loaded)


@pytest.mark.parametrize(
    ("override", "subject", "said"),
    [
        ("trainer.seed", "override", "fix: write trainer.seed=VALUE"),
        ("trainer.sed", "override", "fix: write trainer.seed=VALUE"),
        ("=3", "override", "must have the form key=value"),
        ("trainer.sead=3", "trainer.sead", "did you mean trainer.seed?"),
        ("+trainer.seed=3", "+trainer.seed", "did you mean trainer.seed?"),
        ("optim.betas[0]=3", "optim.betas[0]", "did you mean optim.betas?"),
        ("lora_rank=16", "lora_rank", "as model.lora_rank"),
        ("trainer.seed=[", "trainer.seed", "the value is no YAML"),
        ("trainer.seed=a: b: c", "trainer.seed", "the value is no YAML"),
        ("trainer.seed=x", "trainer.seed", "must be a whole number; this is a text"),
        ("trainer.seed=010", "trainer.seed", "YAML reads 010 as 8"),
        ("trainer.project_name=no", "trainer.project_name", "YAML reads no as false"),
        ("trainer.project_name=\udcff", "trainer.project_name", "U+DCFF"),
        ("data=3", "data", "must be a mapping of settings"),
        ("data={max_lenght: 3}", "data.max_lenght", "did you mean data.max_length?"),
        ("data.apply_chat_template_kwargs.a[0]=1", "data.apply_chat_template_kwargs.a[0]", "letters, digits"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, subject: str, said: str):
    problem = only(load(tmp_path, "trainer: {experiment_name: a}", override))
    assert (problem.subject, problem.origin) == (subject, "command line")
    assert said in problem.text()


# Other names


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("data: {micro_batch_size: 3}", "data.micro_batch_size_per_gpu", 3),
        ("optim: {lr_warmup_steps_ratio: 0.3}", "optim.warmup_steps_ratio", 0.3),
        ("optim: {lr_warmup_steps: 7}", "optim.warmup_steps", 7),
        ("trainer: {resume_from_path: /a}", "trainer.resume_path", "/a"),
        ("model: {path: /m}", "model.partial_pretrain", "/m"),
    ],
)
def test_other_names_are_read_and_said(tmp_path: Path, text: str, key: str, value: object):
    loaded = load(tmp_path, text)
    assert texts(loaded) == []
    section, name = key.split(".")
    assert getattr(getattr(loaded.config, section), name) == value
    assert loaded.origin(key) == "job.yaml:1"
    assert loaded.mappings == [
        f"{text.split(':')[0]}.{text.split('{')[1].split(':')[0]} (job.yaml:1) -> {key} = {value}"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "data: {micro_batch_size: null, micro_batch_size_per_gpu: 3}",
        "data: {micro_batch_size: 3, micro_batch_size_per_gpu: 3}",
        "data: {micro_batch_size_per_gpu: 3}",
    ],
)
def test_both_names_that_agree(tmp_path: Path, text: str):
    loaded = load(tmp_path, text)
    assert texts(loaded) == []
    assert loaded.config.data.micro_batch_size_per_gpu == 3


@pytest.mark.parametrize("unset", ["null", "0", "-1"])
def test_warmup_steps_of_verl_that_mean_unset(tmp_path: Path, unset: str):
    loaded = load(tmp_path, f"optim: {{lr_warmup_steps: {unset}}}")
    assert (texts(loaded), loaded.config.optim.warmup_steps, loaded.mappings) == ([], None, [])


def test_both_names_that_differ(tmp_path: Path):
    problem = only(load(tmp_path, "data:\n  micro_batch_size: 2\n  micro_batch_size_per_gpu: 3"))
    assert (problem.subject, problem.origin) == ("data.micro_batch_size_per_gpu", "job.yaml:3")
    assert "means the same as data.micro_batch_size = 2 (job.yaml:2), which differs" in problem.rule


def test_another_name_on_the_command_line_beats_the_file(tmp_path: Path):
    loaded = load(tmp_path, "optim: {warmup_steps_ratio: 0.1}", "optim.lr_warmup_steps_ratio=0.4")
    assert (texts(loaded), loaded.config.optim.warmup_steps_ratio) == ([], 0.4)


def test_a_wrong_value_under_another_name(tmp_path: Path):
    problem = only(load(tmp_path, "optim:\n  lr_warmup_steps: x"))
    assert (problem.subject, problem.origin) == ("optim.lr_warmup_steps", "job.yaml:2")
    assert "must be a whole number or null" in problem.rule


# What is said and saved


def test_settings_without_use_are_listed_with_the_reason(tmp_path: Path):
    loaded = load(tmp_path, "model:\n  use_liger: true\n  strategy: fsdp2\n", "trainer.nnodes=2")
    assert loaded.ignored == [
        f"model.use_liger = True (job.yaml:2): {KEYS['model.use_liger'].ignored}",
        f"model.strategy = fsdp2 (job.yaml:3): {KEYS['model.strategy'].ignored}",
        f"trainer.nnodes = 2 (command line): {KEYS['trainer.nnodes'].ignored}",
    ]


def test_origins_are_aligned_and_name_only_what_is_no_default(tmp_path: Path):
    loaded = load(tmp_path, "trainer:\n  seed: 7\n  log_freq: 1\n  project_name: a-long-name\n", "optim.lr=1")
    assert origins_text(loaded).splitlines() == [
        "optim.lr = 1.0                          (command line)",
        "trainer.default_local_dir = /runs/sft   (environment CHECKPOINT_DIR)",
        "trainer.project_name = a-long-name      (job.yaml:4)",
        "trainer.seed = 7                        (job.yaml:2)",
    ]


def test_origins_of_defaults_only_is_empty(tmp_path: Path):
    loaded = load(tmp_path, "trainer: {seed: 1}", "trainer.default_local_dir=null", environ={})
    assert origins_text(loaded) == ""


def test_a_saved_config_does_not_look_at_checkpoint_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load(tmp_path, "trainer: {seed: 7}")
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(loaded))
    monkeypatch.setenv("CHECKPOINT_DIR", "/elsewhere")
    assert load_resolved(saved) == loaded.config
    assert load_resolved(saved).trainer == TrainerConfig(seed=7, default_local_dir="/runs/sft")
    assert load_resolved(saved).data == DataConfig()


@pytest.mark.parametrize("damage", [b"", b"data:\n\tx: 1", b"data: {max_length: x}", b"- 1"])
def test_a_damaged_saved_config(tmp_path: Path, damage: bytes):
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(ProblemsError, match=r"config\.yaml"):
        load_resolved(tmp_path / "config.yaml")
    with pytest.raises(ProblemsError, match="No such file"):
        load_resolved(tmp_path / "none.yaml")
