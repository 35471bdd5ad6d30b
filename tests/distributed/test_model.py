"""What the trained module computes: the same as plain transformers, each document alone, at every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import save_model

KINDS = ["qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral"]


def _module(folder: Path, ulysses: int = 1, dtype: str = "fp32", init: str = "pretrained", seed: int = 1):
    from sft_job.config.schema import FsdpConfig, ModelConfig
    from sft_job.model.build import build_model
    from sft_job.model.precision import precision_of
    from sft_job.parallel.mesh import build_mesh
    from sft_job.runtime import start_runtime

    runtime = start_runtime(60)
    mesh = build_mesh("cpu", ulysses)
    config = ModelConfig(partial_pretrain=str(folder), init=init, fsdp_config=FsdpConfig(model_dtype=dtype))
    precision = precision_of(config.fsdp_config, "cpu")
    return build_model(config, mesh, runtime.device, precision, seed, load=True)[0], mesh


def _documents(lengths: list[int], seed: int = 0) -> list:
    from sft_job.data.cache import TokenRow

    random = np.random.default_rng(seed)
    ids = [random.integers(3, 290, length).astype(np.int32) for length in lengths]
    return [TokenRow(row, np.ones(len(row), dtype=bool)) for row in ids]


def _logits(folder: Path, lengths: list[int], ulysses: int, changed: int) -> list[torch.Tensor]:
    """Whole-sequence logits of two packs that differ in one document only."""
    import torch.distributed as dist

    from sft_job.data.batches import pack_rows

    module, mesh = _module(folder, ulysses)
    out = []
    for seed in (1, 2):
        rows = _documents(lengths)
        rows[changed] = _documents([lengths[changed]], seed)[0]
        batch = pack_rows(rows, ulysses, mesh.layout.ulysses_rank, 0)
        with torch.no_grad():
            module(batch)  # gathers the root's weights, which the lines below use
            hidden = module.hidden(batch)[0]
            head = module.lm.get_output_embeddings().weight
            weight = head.full_tensor() if hasattr(head, "full_tensor") else head
            logits = hidden @ weight.T
        parts = [torch.empty_like(logits) for _ in range(ulysses)]
        if mesh.ulysses is None:
            parts = [logits]
        else:
            dist.all_gather(parts, logits, group=mesh.ulysses)
        out.append(torch.cat(parts))
    return out


def _plain_loss_and_gradients(folder: Path, lengths: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients by plain transformers with eager attention, one document after the other, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    total = torch.zeros((), dtype=torch.float64)
    for row in _documents(lengths):
        ids = torch.tensor(row.ids[None].astype(np.int64))
        if ids.shape[1] > 1:
            logits = model(ids).logits[0, :-1].double()
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


def _loss_and_gradients(folder: Path, lengths: list[int], ulysses: int) -> tuple[float, dict[str, torch.Tensor]]:
    import torch.distributed as dist

    from sft_job.data.batches import pack_rows

    module, mesh = _module(folder, ulysses, "fp64")
    loss = module(pack_rows(_documents(lengths), ulysses, mesh.layout.ulysses_rank, 0))
    loss.backward()
    dist.all_reduce(total := loss.detach().clone())
    names = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in module.lm.named_parameters()}
    return total.item(), {name: p.grad.full_tensor() for name, p in names.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_transformers(tmp_path, ranks, kind) -> None:
    folder = save_model(tmp_path / kind, kind)
    lengths = [3, 41, 1, 17, 2]
    expected, reference = ranks(1, _plain_loss_and_gradients, folder, lengths)[0]
    loss, gradients = ranks(2, _loss_and_gradients, folder, lengths, 2)[0]
    # Eager attention takes its softmax in fp32, Gemma its norms: no closer than that.
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("ulysses", [1, 2])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("changed", [0, 1, 3])
def test_packed_documents_do_not_see_each_other(tmp_path, ranks, kind, ulysses, changed) -> None:
    """Also the first one is changed: a causal mask alone would hide a later document from those before it."""
    folder = save_model(tmp_path / kind, kind)
    lengths = [5, 30, 1, 12]
    one, other = ranks(ulysses, _logits, folder, lengths, ulysses, changed)[0]
    sizes = [*lengths, len(one) - sum(lengths)]  # padding is the last document
    pairs = zip(one.split(sizes), other.split(sizes), strict=True)
    for document, (mine, yours) in enumerate(pairs):
        assert torch.equal(mine, yours) is (document != changed)


def _random_weights(folder: Path, ulysses: int, seed: int) -> dict[str, torch.Tensor]:
    module, _ = _module(folder, ulysses, init="random", seed=seed)
    return {name: p.full_tensor() for name, p in module.lm.state_dict().items()}


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_random_init_is_the_same_at_every_layout(tmp_path, ranks, kind) -> None:
    folder = save_model(tmp_path / kind, kind)
    (folder / "model.safetensors").unlink()
    alone = ranks(1, _random_weights, folder, 1, 1)[0]
    four = ranks(4, _random_weights, folder, 2, 1)[0]
    other = ranks(1, _random_weights, folder, 1, 2)[0]
    assert alone.keys() == four.keys()
    assert all(torch.equal(four[name], weight) for name, weight in alone.items())
    projection = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(other[projection], alone[projection])
    assert alone[projection].std().item() == pytest.approx(0.02, rel=0.1)
    # Gemma's norms multiply by 1 + weight.
    assert alone["model.norm.weight"].unique().tolist() == [0.0 if kind == "gemma" else 1.0]


def _load_error(folder: Path) -> tuple[int, str]:
    from sft_job.errors import JobError

    try:
        _module(folder)
    except JobError as error:
        return int(error.code), str(error)
    return 0, ""


def test_weights_in_several_files(tmp_path, ranks) -> None:
    one = save_model(tmp_path / "one", "qwen2")
    many = save_model(tmp_path / "many", "qwen2", file_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    expected = ranks(1, _loss_and_gradients, one, [9, 4], 1)[0][0]
    assert ranks(2, _loss_and_gradients, many, [9, 4], 2)[0][0] == pytest.approx(expected, rel=1e-12)


def test_missing_weights_are_named(tmp_path, ranks) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", "qwen2")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, message = ranks(1, _load_error, folder)[0]
    assert code == 66
    assert "model.layers.1.mlp.up_proj.weight" in message


def _supported(folder: Path) -> str:
    from sft_job.config.schema import ModelConfig
    from sft_job.errors import JobError
    from sft_job.model.supported import check_architecture

    try:
        check_architecture(ModelConfig(partial_pretrain=str(folder)))
    except JobError as error:
        return f"exit {error.code}: {error}"
    return ""


UNSUPPORTED = {
    "Qwen3_5TextConfig": "Qwen3_5GatedDeltaNet",
    "FalconH1Config": "FalconH1Mixer",
    "RecurrentGemmaConfig": "RecurrentGemmaRglru",
    "BloomConfig": "0 of its 2 blocks attend",
    "FalconConfig": "does not take packed documents",
    "StableLmConfig": "does not take packed documents",
    "GptOssConfig": "s_aux",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_packing_does_not_reach_are_refused(tmp_path, ranks, name) -> None:
    """They mix tokens outside attention, or do not attend through transformers' interface."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    getattr(transformers, name)(**sizes).save_pretrained(tmp_path)
    message = ranks(1, _supported, tmp_path)[0]
    assert message.startswith("exit 2: ")
    assert UNSUPPORTED[name] in message


@pytest.mark.parametrize("kind", KINDS)
def test_supported_families(tmp_path, ranks, kind) -> None:
    from tests.tiny import model_config

    model_config(kind, 300).save_pretrained(tmp_path)
    assert ranks(1, _supported, tmp_path)[0] == ""


def test_an_unknown_model_type_is_a_model_problem(tmp_path, ranks) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert ranks(1, _supported, tmp_path)[0].startswith("exit 66: ")


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_packs_shorter_than_the_group(tmp_path, ranks, kind) -> None:
    """One to three tokens over four ranks, documents without a target among them: the gradients of one rank."""
    folder = save_model(tmp_path / kind, kind)
    for lengths in ([2], [1, 2], [3], [1, 1, 3]):
        expected, reference = ranks(1, _loss_and_gradients, folder, lengths, 1)[0]
        loss, gradients = ranks(4, _loss_and_gradients, folder, lengths, 4)[0]
        assert loss == pytest.approx(expected, rel=1e-12)
        # Some are zero but for rounding (a first token attends to itself alone): one scale for all.
        scale = max(gradient.abs().max().item() for gradient in reference.values())
        for name, gradient in reference.items():
            assert (gradients[name] - gradient).abs().max().item() <= 1e-12 * scale, name


def _export(folder: Path, output: Path) -> torch.Tensor:
    """Write the sharded model as a run does at its end; its own logits of one document."""
    from sft_job.config.schema import JobConfig
    from sft_job.data.batches import pack_rows
    from sft_job.export import export_live

    module, mesh = _module(folder)
    config = JobConfig()
    config.model.partial_pretrain = str(folder)
    export_live(output, module.lm, config, torch.device("cpu"), write=mesh.layout.dp_rank == 0)
    with torch.no_grad():
        batch = pack_rows(_documents([37]), 1, 0, 0)
        module(batch)  # gathers the root's weights
        hidden = module.hidden(batch)[0]
        head = module.lm.get_output_embeddings().weight
        weight = head.full_tensor() if hasattr(head, "full_tensor") else head
        return module._rule.apply(hidden @ weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_gives_the_live_models_logits(tmp_path, ranks, kind) -> None:
    """Tied and untied, written by two ranks: the same logits in plain transformers, the same names as the base's."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / kind, kind)
    output = tmp_path / "out"
    output.mkdir()
    live = ranks(2, _export, folder, output)[0]
    names = load_file(folder / "model.safetensors").keys()
    assert load_file(output / "model.safetensors").keys() == names
    plain = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    ids = torch.tensor(_documents([37])[0].ids[None].astype(np.int64))
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits[0], live, rtol=1e-4, atol=1e-4)
