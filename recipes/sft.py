"""Supervised fine-tuning with LoRA: rows and a checkpoint in, an adapter and proven exports out."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import GptOssForCausalLM, PrinterCallback, TrainingArguments

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import restore_adapter, save_adapter
from gptoss_ft.config.load import to_yaml
from gptoss_ft.config.schema import AdapterConfig, DataConfig, ModelConfig, TrainConfig, TrainerConfig
from gptoss_ft.config.values import ROUNDED_FORMATS, Rounding
from gptoss_ft.data.collate import PaddingCollator
from gptoss_ft.data.files import absolute
from gptoss_ft.data.packing import best_fit
from gptoss_ft.data.prefix_tree import plan_trees
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.data.training_rows import PackedSamples, PackedTrees, SampleRows, TrainingRows
from gptoss_ft.errors import UserError
from gptoss_ft.export.fingerprint import write_fingerprint
from gptoss_ft.files import check_writable_parent
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes.export import Calibrated, check_trained_rounding, export_run
from gptoss_ft.recipes.machine import check_variables
from gptoss_ft.recipes.samples import split_samples
from gptoss_ft.recipes.verify import verify_run
from gptoss_ft.training.audit import AuditCallback
from gptoss_ft.training.callbacks import MetricsCallback, ProgressCallback
from gptoss_ft.training.memory import keeping_freed_memory, peak_gib
from gptoss_ft.training.run_folder import RunFolder, checkpoint_steps, write_json
from gptoss_ft.training.trackers import trackers_in
from gptoss_ft.training.trainer import SftTrainer

GLOO_PAUSE_S = 0.5
# What adapts a base model, by the adapter section and a seed for the initial weights.
Attach = Callable[[GptOssForCausalLM, AdapterConfig, int], PeftModel]


def main(cfg: TrainConfig) -> Path:
    """Run `gptoss-ft train` with adapters beside the frozen weights; returns the run folder."""
    return run_training(cfg, attach)


def run_training(cfg: TrainConfig, attach: Attach) -> Path:
    """Train what `attach` makes of the base model, export and verify it; returns the run folder.

    Raises:
        UserError: if rows, checkpoint or folder cannot be used, and nothing has been trained then; if training
            diverges; if an export is beyond its bounds.
    """
    # Without a GPU the processes of torchrun are told apart only if the CPU is asked for by name.
    state = PartialState(cpu=not torch.cuda.is_available())
    check_devices()
    cfg = with_absolute_paths(cfg)
    run = RunFolder(cfg.run.dir)
    resume_from = open_run_folder(run, cfg)
    train_set, eval_set = build_datasets(cfg.data, cfg.seed, skipped_path=f"{run.path}.skipped.jsonl")
    base = prepare_base(cfg.model, cfg.seed)
    model = attach(base, cfg.adapter, cfg.seed)
    if state.is_main_process:
        begin_record(run, cfg, resume_from)

    with trackers_in(run.path):
        trainer = make_trainer(model, train_set, eval_set, run, cfg.trainer, cfg.seed)
        if eval_set and resume_from is None:
            trainer.evaluate()
        train(trainer, resume_from)
        after = trainer.evaluate() if eval_set else {}

    if state.num_processes > 1:
        # gloo's thread needs the GIL to let go of the last tensors that it added up, and the end of the group, which
        # holds the GIL, waits for that thread: without a pause the two can wait for each other for ever.
        time.sleep(GLOO_PAUSE_S)
    # The rest is the main process's alone; verify's reference implementation would split a model over a group.
    state.destroy_process_group()
    if state.is_main_process:
        save_adapter(model, run.adapter)
        write_json(run.summary, summarise(trainer, run.first_evaluation(), after.get("eval_loss")))
        # Exports stream from the files: the trained model is not needed, and its memory is.
        del trainer, model, base
        export_all(run, cfg)
    return run.path


def check_devices() -> None:
    """Refuse what would fail or be wrong only after everything has been loaded."""
    check_variables()
    if torch.cuda.device_count() > 1 and PartialState().num_processes == 1:
        # Trainer would fall back to DataParallel and drop our loss scaling.
        raise UserError(
            "several GPUs are visible to one process: choose one with CUDA_VISIBLE_DEVICES=0, "
            "or use all with `torchrun --nproc-per-node=gpu -m gptoss_ft train ...`"
        )


def with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """The config as it is recorded: it means the same from any working directory."""
    data = replace(
        cfg.data,
        path=[absolute(path) for path in cfg.data.path],
        eval_path=cfg.data.eval_path and [absolute(path) for path in cfg.data.eval_path],
        skipped_path=cfg.data.skipped_path and os.path.abspath(cfg.data.skipped_path),
        cache_dir=cfg.data.cache_dir and os.path.abspath(cfg.data.cache_dir),
    )
    model = replace(cfg.model, path=os.path.abspath(cfg.model.path))
    return replace(cfg, run=replace(cfg.run, dir=os.path.abspath(cfg.run.dir)), model=model, data=data)


def open_run_folder(run: RunFolder, cfg: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run in an unused folder."""
    if cfg.run.resume:
        checkpoint = run.last_checkpoint()
        run.check_resumed_config(to_yaml(cfg))
        if cfg.adapter.qat:
            check_trained_rounding(run)
        return checkpoint
    if PartialState().is_main_process:
        check_writable_parent(run.path)
        run.check_unused(except_for=Path(cfg.model.path))
    return None


def begin_record(run: RunFolder, cfg: TrainConfig, resume_from: Path | None) -> None:
    """Write what it takes to repeat the run, before its first step."""
    # The record is of the whole run: repeating it starts at the beginning.
    run.write_origin(to_yaml(replace(cfg, run=replace(cfg.run, resume=False))))
    write_fingerprint(run.path, Checkpoint.open(cfg.model.path))
    if cfg.adapter.qat and resume_from is None:
        run.write_rounding(DITHER_RULE)
    if resume_from is not None:
        run.forget_metrics_after(checkpoint_steps(resume_from)[0])


def train(trainer: SftTrainer, resume_from: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one; the checkpoint of the last step needs no more steps."""
    if resume_from is not None:
        done, planned = checkpoint_steps(resume_from)
        if done >= planned:
            restore_adapter(trainer.model, resume_from)
            return
    try:
        with keeping_freed_memory():
            trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    finally:
        # An error's message belongs on a line of its own.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.close()


def build_datasets(
    cfg: DataConfig, seed: int, *, skipped_path: str | None = None
) -> tuple[TrainingRows, TrainingRows | None]:
    """Compile every row and say what came of it; returns training and held-out samples (None if nothing is).

    Rows that are left out go to the config's `skipped_path`, else to this one.
    """
    is_main = PartialState().is_main_process
    with SkippedRows((cfg.skipped_path or skipped_path) if is_main else None) as skipped:
        train_samples, held_out, compiled = split_samples(cfg, seed, skipped=skipped, verbose=is_main)
    if is_main:
        print(*compiled, *([skipped] if skipped.count else []), sep="\n")
    rows_of = partial(packed_rows, cfg=cfg, verbose=is_main) if cfg.packing else SampleRows
    return rows_of(train_samples), rows_of(held_out) if held_out else None


def packed_rows(samples: SampleTable, *, cfg: DataConfig, verbose: bool) -> TrainingRows:
    """The samples in rows of `max_length`, with a line of what came of it if `verbose`."""
    trees = list(plan_trees(samples, cfg.max_length)) if cfg.share_prefixes else []
    packed = best_fit([tree.size for tree in trees] or samples.lengths.tolist(), cfg.max_length)
    if verbose:
        print(f"{len(samples)} samples of {samples.lengths.sum()} tokens {packed}")
    return PackedTrees(samples, trees, packed.rows) if trees else PackedSamples(samples, packed.rows)


def prepare_base(cfg: ModelConfig, seed: int) -> GptOssForCausalLM:
    """Load the base model, after writing random weights if that was asked for and nothing is there."""
    state = PartialState()
    if cfg.init is not None and state.is_main_process and not Path(cfg.path).exists():
        init_checkpoint(cfg.init, Path(cfg.path), seed=seed)
    state.wait_for_everyone()
    dtype = getattr(torch, cfg.dtype.value)
    return load_base(
        cfg.path,
        precision=cfg.precision,
        dtype=dtype,
        attn_implementation=cfg.attn_implementation,
        device=state.device,
    )


def attach(base: GptOssForCausalLM, cfg: AdapterConfig, seed: int) -> PeftModel:
    """LoRA on what the adapter section targets, initialised from `seed`."""
    targets = Targets.parse(
        cfg.targets,
        num_layers=base.config.num_hidden_layers,
        num_experts=base.config.num_local_experts,
        layers=cfg.layers,
        experts=cfg.experts,
    )
    torch.manual_seed(seed)
    model, attached = attach_adapters(
        base, targets, r=cfg.r, alpha=cfg.alpha, use_rslora=cfg.use_rslora, dropout=cfg.dropout
    )
    if PartialState().is_main_process:
        print(attached)
    return model


def make_trainer(
    model: PeftModel,
    train_set: TrainingRows,
    eval_set: TrainingRows | None,
    run: RunFolder,
    cfg: TrainerConfig,
    seed: int,
) -> SftTrainer:
    """transformers' Trainer by the trainer section, with our loss, audit, metrics and progress bar."""
    trainer = SftTrainer(
        model=model,
        args=training_arguments(cfg, run, seed),
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=PaddingCollator(pad_token_id=model.config.pad_token_id),
        loss_chunk_size=cfg.loss_chunk_size,
    )
    # Trainer prints its logs where there is no bar of its own; ours shows them.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AuditCallback(model, run.audit))
    trainer.add_callback(MetricsCallback(run.metrics))
    trainer.add_callback(ProgressCallback())
    return trainer


def training_arguments(cfg: TrainerConfig, run: RunFolder, seed: int) -> TrainingArguments:
    """The trainer section in transformers' own terms."""
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=cfg.max_steps,
        num_train_epochs=cfg.num_train_epochs,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=cfg.lr_scheduler_type.value,
        warmup_steps=cfg.warmup_steps,
        per_device_train_batch_size=cfg.per_device_train_batch_size,
        per_device_eval_batch_size=cfg.per_device_eval_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        optim=cfg.optim.value,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        # Its new name in transformers; reentrant ones would need an input that requires a gradient, and the
        # embeddings are frozen.
        activation_checkpointing=cfg.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=cfg.logging_steps,
        eval_strategy="steps" if cfg.eval_steps else "no",
        eval_steps=cfg.eval_steps or None,
        save_strategy="steps" if cfg.save_steps else "no",
        save_steps=cfg.save_steps or 500,
        save_total_limit=cfg.save_total_limit,
        report_to=[reporter.value for reporter in cfg.report_to],
        run_name=run.path.name,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every adapter takes part in every pass, experts without tokens by gradients of zero.
        ddp_find_unused_parameters=False,
        # Our collator picks the columns, and our bar shows the progress.
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def summarise(trainer: SftTrainer, before: float | None, after: float | None) -> dict[str, object]:
    """The run in a few numbers; `before` and `after` are held-out losses in nats per token."""
    train_losses = [line["train_loss"] for line in trainer.state.log_history if "train_loss" in line]
    return {
        "steps": trainer.state.global_step,
        "mean_train_loss_nats": train_losses[-1] if train_losses else None,
        "eval_loss_before_nats": before,
        "eval_loss_after_nats": after,
        "peak_gib": peak_gib(),
    }


def export_all(run: RunFolder, cfg: TrainConfig) -> None:
    """Write and verify the exports that the config asks for.

    Raises:
        UserError: if an export is further from the trained model than its stated bounds.
    """
    for format in cfg.export.formats:
        rounding = cfg.export.rounding if format in ROUNDED_FORMATS else Rounding.nearest
        out = export_run(
            run.path,
            format.value,
            run.exports / format.value,
            dithered=rounding is Rounding.dithered,
            calibrated=Calibrated(cfg.export.calibration_tokens) if rounding is Rounding.calibrated else None,
            fidelity_tokens=cfg.export.fidelity_tokens,
            min_fidelity=cfg.export.min_fidelity,
        )
        if cfg.export.verify:
            report = verify_run(run.path, out, min_fidelity=cfg.export.min_fidelity)
            print(report)
            if not report.passed:
                raise UserError(f"{out}: {report.verdict}, for the reasons in the report above")
