"""Typed settings of a run. Field names are those of the ``sft_trainer.yaml`` that users bring.

The docstring under each field says its unit, what values are allowed and what "off" means. The rules between
fields are in ``validate.py``; what a key of the YAML does, or why it does nothing, is in ``keys.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional


@dataclass
class MultiturnConfig:
    """Conversations instead of prompt and response columns."""

    enable: bool = False
    """Train on a column of messages instead of prompt and response columns."""
    messages_key: str = "messages"
    """Column that holds the list of messages."""
    tools_key: str = "tools"
    """Column that holds the tools' descriptions, where there is one."""
    enable_thinking_key: str = "enable_thinking"
    """Column that says row by row whether the template renders with thinking."""
    train_on: str = "all"
    """Which of the assistant's turns are trained: all, or only the last one of a conversation."""


@dataclass
class CustomClsConfig:
    """A user's own data set class."""

    path: Optional[str] = None
    """Python file that holds the class; null = the job's own data set."""
    name: Optional[str] = None
    """Name of the class in that file."""


@dataclass
class DataConfig:
    """Rows, tokens and batches."""

    train_batch_size: int = 256
    """Rows in a global batch, over all ranks and micro-batches; any size from 1."""
    micro_batch_size_per_gpu: int = 4
    """Rows that a Ulysses group works on at once; unused with use_dynamic_bsz."""
    use_dynamic_bsz: bool = False
    """Fill micro-batches by tokens (max_token_len_per_gpu) instead of rows."""
    max_token_len_per_gpu: int = 8192
    """Tokens of a micro-batch per rank (times the Ulysses size per group); a longer row goes alone."""
    train_files: Any = None
    """Parquet: a file, a folder, a glob pattern, or a list of these; or a mapping from the names of several data sets
    to entries: each the same, or a mapping with the keys of ``sets.SetEntry``."""
    val_files: Any = None
    """The same for validation, where sets have no weight and no repeat; null = no validation."""
    train_max_samples: int = -1
    """Use only the first rows of the training files (of each named data set); -1 = all."""
    val_max_samples: int = -1
    """Use only the first rows of the validation files (of each named data set); -1 = all."""
    prompt_key: Any = "prompt"
    """Column of the prompt, or a list of columns whose texts are joined by a line break."""
    response_key: Any = "response"
    """Column of the response, or a list of columns whose texts are joined by a line break."""
    prompt_dict_keys: Optional[List[str]] = None
    """Keys to descend, one after the other, into a prompt column that holds structs."""
    response_dict_keys: Optional[List[str]] = None
    """Keys to descend, one after the other, into a response column that holds structs."""
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    """Conversations."""
    max_length: int = 1024
    """Longest row in tokens. Nothing is ever padded to it."""
    truncation: str = "error"
    """What to do with a longer row: error (refuse), left (cut its start), right (cut its end), drop (leave it out),
    turn (leave out whole turns, the oldest first; a row whose last turn alone is too long is left out)."""
    max_rejected_fraction: float = 0.0
    """Share of the rows that may be unusable (damaged, null, not rendered, overlong under truncation: error) and are
    then left out; with more of them the run is refused."""
    allow_control_tokens: bool = False
    """Let control tokens that stand in a row's text (<|im_end|>, say) act as control tokens; false = as plain text."""
    balance_dp_token: bool = False
    """Kept for old files: rows are always balanced and the loss always counts every token once."""
    chat_template: Optional[str] = None
    """Chat template to use instead of the tokenizer's; null = the tokenizer's."""
    apply_chat_template_kwargs: Dict[str, Any] = field(default_factory=dict[str, Any])
    """Extra variables for the chat template, such as enable_thinking."""
    custom_cls: CustomClsConfig = field(default_factory=CustomClsConfig)
    """A user's own data set class."""
    use_shm: bool = False
    """Copy the files to shared memory first."""
    cache_dir: Optional[str] = None
    """Folder of the token cache; null = cache/ in the run folder. It may be shared by many runs."""
    num_workers: Optional[int] = None
    """Processes that tokenise; null = the cores this process may use."""


@dataclass
class WrapPolicyConfig:
    """How the model is cut into FSDP groups."""

    min_num_params: int = 0
    """Kept for old files: groups are always the decoder blocks."""


@dataclass
class FsdpConfig:
    """Precision and sharding of the model."""

    model_dtype: str = "fp32"
    """Dtype of weights and optimizer states: bf16, fp32 or fp64."""
    dtype: Optional[str] = None
    """Dtype of the computation; null = bf16 on CUDA, model_dtype on CPU."""
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)
    """How the model is cut into FSDP groups."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory."""
    offload_params: bool = False
    """Other name of cpu_offload."""
    fsdp_size: int = -1
    """Ranks over which parameters are sharded; -1 = all. A smaller number shards within groups of that many
    neighbouring ranks and replicates between the groups (HSDP)."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward; false keeps them for the backward, and from one micro-batch
    of a step to the next."""
    shard_frozen: Any = "auto"
    """Shard the weights that LoRA does not train: true, false (every rank holds them whole, and nothing is gathered),
    or auto (whole where they take less than a third of the GPU's memory)."""
    shard_accumulated: Any = "auto"
    """Add gradients of a step's micro-batches up in each rank's shard alone: true (every micro-batch is reduced over
    the ranks), false (they are reduced once a step, and until then every rank keeps gradients of all trained weights,
    in fp32), or auto (true where those would take more than a quarter of the GPU's memory)."""


@dataclass
class ModelConfig:
    """The base model."""

    partial_pretrain: Optional[str] = None
    """Folder of a Hugging Face causal language model with its tokenizer."""
    init: str = "pretrained"
    """pretrained (read the weights) or random (only config.json is used; weights drawn from trainer.seed)."""
    use_shm: bool = False
    """Copy the model to shared memory first."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    """Precision and sharding."""
    external_lib: Optional[str] = None
    """Python module to import before the model is built."""
    enable_gradient_checkpointing: bool = True
    """Recompute each decoder block in the backward instead of keeping its activations."""
    recompute: str = "auto"
    """What is computed again in the backward: auto (on a GPU as little as its memory allows, where
    enable_gradient_checkpointing is on; on the CPU whole blocks), none, attention (all but attention), full, offload
    (full, and the blocks' inputs wait in host memory; MLPs work on a long sequence in pieces)."""
    compile: Any = "auto"
    """Run decoder blocks and loss through torch.compile: true, false, or auto (on a GPU)."""
    fp8: str = "none"
    """Matrix products of the decoder blocks in fp8: none, tensorwise (faster) or rowwise (more exact)."""
    attention: str = "auto"
    """Attention backend: auto (the fastest that offers what the model needs) or a backend's name."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings."""
    lora_rank: int = 0
    """Rank of the LoRA adapters; 0 = train all weights."""
    lora_alpha: float = 16
    """Scale of the LoRA adapters is lora_alpha / lora_rank."""
    target_modules: Any = "all-linear"
    """Modules that get LoRA adapters: all-linear or a list of names."""
    exclude_modules: Any = None
    """Modules that get no LoRA adapter although target_modules names them: a list of names, or a pattern."""
    lora_adapter_path: Optional[str] = None
    """Folder of a PEFT LoRA adapter to go on from; its rank, alpha and modules hold."""
    use_liger: bool = False
    """Kept for old files."""
    strategy: str = "fsdp"
    """fsdp or fsdp2: both mean FSDP2."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1.0e-5
    """Peak learning rate."""
    betas: List[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: float = 1.0e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on every trained weight."""
    no_decay_on_norms_and_biases: bool = False
    """Leave weights of one dimension (norms, biases) out of the weight decay."""
    warmup_steps_ratio: float = 0.1
    """Share of all steps over which the rate rises; unused where warmup_steps is set."""
    warmup_steps: Optional[int] = None
    """Steps over which the rate rises; null = by warmup_steps_ratio."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    lr_scheduler: str = "cosine"
    """cosine (down to min_lr_ratio at the last step), wsd (stable, then down over the last tenth) or constant."""
    min_lr_ratio: float = 0.0
    """Share of the peak rate at which cosine and wsd end."""


@dataclass
class CheckpointConfig:
    """What a checkpoint holds."""

    save_contents: List[str] = field(default_factory=lambda: ["model", "optimizer", "extra"])
    """Any of model, optimizer, extra (step and position) and hf_model (a Hugging Face folder in every checkpoint).
    The last checkpoint always holds a Hugging Face folder; model, optimizer and extra are needed to resume."""


@dataclass
class TrainerConfig:
    """The run: length, checkpoints, validation, logging."""

    default_local_dir: Optional[str] = None
    """Run folder, unless CHECKPOINT_DIR is set (then $CHECKPOINT_DIR/sft)."""
    default_hdfs_dir: Optional[str] = None
    """Remote folder to which published checkpoints are copied; null = none."""
    resume_mode: str = "auto"
    """auto (newest checkpoint of the run folder, if any), disable (refuse to start over one) or resume_path."""
    resume_path: Optional[str] = None
    """Checkpoint folder to start from; it wins where resume_mode is auto and the run folder is still empty."""
    project_name: str = "sft_job"
    """Project in wandb."""
    experiment_name: str = "sft"
    """Name of the run in wandb."""
    total_epochs: int = 4
    """Passes over the training rows."""
    total_training_steps: Optional[int] = None
    """End after this many optimizer steps; null = by total_epochs. The learning rate's horizon follows."""
    logger: List[str] = field(default_factory=lambda: ["console"])
    """Any of console, wandb, tensorboard and file; file means metrics.jsonl, which is always written."""
    seed: int = 1
    """Drives row order, dropout and random initialisation."""
    save_freq: int = -1
    """Steps between kept checkpoints; -1 = only the last one."""
    test_freq: Any = -1
    """Steps between validations, after_each_epoch, or -1 = only at the end."""
    nnodes: int = 1
    """Nodes of the run: only compared with what the launcher says."""
    n_gpus_per_node: int = 8
    """Ranks on a node: only compared with what the launcher says."""
    max_ckpt_to_keep: Optional[int] = None
    """Kept checkpoints, the newest ones; null = all."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What a checkpoint holds."""
    async_save: bool = True
    """Write checkpoints from a copy in host memory while training goes on; false = training waits for the disk."""
    recovery_minutes: float = 15
    """Minutes between recovery checkpoints: one at a time, replaced by the next checkpoint of any kind; 0 = none."""
    on_save_failure: str = "end"
    """What follows where a kept checkpoint cannot be written: end (73) or continue (a warning; the next one tries
    again). A failed recovery checkpoint is always a warning; the last one and that of a stop always end the run."""
    log_freq: int = 1
    """Steps between lines of metrics.jsonl and of the loggers."""
    allow_changed: List[str] = field(default_factory=list[str])
    """Settings that may differ from the checkpoint's when a run goes on."""
    non_finite: str = "stop"
    """A step whose loss or gradient is not finite: stop (the run ends with 87) or skip (go on without it)."""
    max_skipped_steps: int = 10
    """With non_finite: skip, the run ends at the next such step after so many."""
    preflight: bool = True
    """Of several nodes, compare software, settings, data, model and run folder before weights are loaded."""
    rehearsal: bool = True
    """Go through the longest batch once before the first step, so that too little memory shows at once."""
    timeout_seconds: int = 600
    """A collective that takes longer ends the run with 137."""
    max_wall_seconds: Optional[int] = None
    """Stop in time to have saved this many seconds after the start; null = no limit."""
    max_starts_without_progress: int = 3
    """Starts in a row without a new step after which the run is refused with 86; 0 = never."""
    deterministic: bool = False
    """Only deterministic kernels on the GPU (slower). CPU runs always are."""


@dataclass
class JobConfig:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ulysses_sequence_parallel_size: int = 1
    """Ranks that share each sequence; it divides the attention heads and the number of ranks."""
    use_remove_padding: bool = True
    """Pack the rows of a micro-batch into one sequence; false = one row a forward pass."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
