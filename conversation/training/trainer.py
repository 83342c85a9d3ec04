"""LoRA training in FP32: the trainable model, the run of all steps, and what they leave."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, set_seed

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.adapters import add_adapters
from conversation.runs.files import file_hashes, replace_folder, sha256_file
from conversation.runs.folder import RunFolder
from conversation.runs.record import TrainingResult, now
from conversation.training.checkpoints import (
    CheckpointKeeper,
    finished_state,
    remove_unfinished_checkpoints,
    training_failure,
)
from conversation.training.conversation_trainer import ConversationTrainer
from conversation.training.memory import peak_memory_gb
from conversation.training.memory_plan import load_frozen
from conversation.training.shared_prefix import use_shared_prefix_attention, uses_shared_prefix_attention
from conversation.training.training_set import TrainingSet
from conversation.training.watch import ExplosionGuard, Progress, heed_signals
from conversation_config import TrainingConfig


def build_trainable_model(base_folder: Path, config: TrainingConfig) -> PeftModel:
    """The base model with fresh adapters, ready for the step that `--step` asks for.

    Raises UserError when the base cannot be loaded or has no place for adapters, and when `--step shared` asks for a
    step that would not be correct for its architecture.
    """
    base = load_frozen(base_folder, config)
    set_seed(config.seed)
    kind = type(base).__name__
    try:
        model = add_adapters(base, config)
    except ValueError as error:
        raise UserError(f"a {kind} cannot be trained here: {error}", "Gemma, Llama and Qwen models can") from None
    if config.step == "plain":
        return model
    try:
        use_shared_prefix_attention(model)
    except ValueError as error:
        if config.step == "shared":
            raise UserError(
                f"the shared-prefix step cannot train a {kind}: {error}",
                "leave out --step, and it trains with the loss of TRL",
            ) from None
        print(f"This model trains with the loss of TRL, not with the shared-prefix step: {error}")
    return model


def train_adapters(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingSet,
    config: TrainingConfig,
    run: RunFolder,
    checkpoint: Path | None,
) -> TrainingResult | None:
    """Train a model's adapters and leave them in the run's `final_lora`; of several processes the first has the result.

    `model`: from `build_trainable_model`. `tokenizer`: the base's. `checkpoint`: from `choose_checkpoint`; None starts
    anew. Raises UserError: after a signal (128 + its number; the step is saved); status 1 when the loss or a gradient
    is not finite, when the loss explodes, or when the disk is full.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    progress, saving, explosion = Progress(run), CheckpointKeeper(), ExplosionGuard()
    try:
        trainer = ConversationTrainer(model, tokenizer, data, config, run, callbacks=[progress, saving, explosion])
        if plan := trainer.memory_plan():
            print(plan)
        progress.trainer = saving.trainer = explosion.trainer = trainer
        if checkpoint and (
            state := finished_state(checkpoint, config.steps(len(data.training), trainer.args.world_size))
        ):
            trainer._load_from_checkpoint(str(checkpoint))  # no step is left, but the work after the last one may be
            trainer.state = state
            progress.write_metrics(state)
        else:
            with heed_signals(progress):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        remove_unfinished_checkpoints(run.checkpoints)
        if failure := training_failure(error, run, 3 * adapters):
            raise failure from error
        raise
    if progress.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise UserError(
            f"stopped by {progress.signal.name} after step {trainer.state.global_step} of {trainer.state.max_steps}",
            "the step is saved; go on with the same command and --resume",
            128 + progress.signal,
        )
    if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
        raise UserError(
            "the training changed nothing: every adapter is still at its start",
            "raise --learning_rate, or lower --warmup_steps",
            TRIED_AND_FAILED,
        )
    if trainer.metric_at_end("eval_loss") is None:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        _save_final(model, run)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return None
    windows = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return TrainingResult(
        steps=trainer.state.global_step,
        first_window_loss=windows[0],
        last_window_loss=windows[-1],
        held_out_loss_before=held_out[0] if held_out else None,
        held_out_loss=held_out[-1] if held_out else None,
        seconds=trainer.state.log_history[-1]["seconds"],
        peak_memory_gb=peak_memory_gb(),
        step="shared" if uses_shared_prefix_attention(model) else "plain",
        adapter_files=file_hashes(run.final_lora),
        files={path.name: sha256_file(path) for path in (run.metrics, run.training_data, run.held_out_data)},
        finished=now(),
        memory_plan=plan,
    )


def _save_final(model: PeftModel, run: RunFolder) -> None:
    """Save the adapters, whole, under their final name."""
    part = run.checkpoints / ".final_lora.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(str(part))
        (part / "README.md").unlink()  # peft's template; `write_report` writes a card from the record
        replace_folder(part, run.final_lora)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        if failure := training_failure(error, run, adapters):
            raise failure from error
        raise
