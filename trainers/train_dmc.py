r"""Retrofit a model so that it decides which tokens keep a row of the cache: merged (DMC) or dropped (DMS).

Dynamic memory compression, Nawrot et al. 2024 (arXiv 2403.09636); dynamic memory sparsification, Lancucki et al. 2025
(arXiv 2506.05345). The embedded model, on one or two CPU cores:

    python -m hf_kvcache.trainers.train_dmc --method dmc --ratio 4 --data books/train --out small-dmc
    python -m hf_kvcache.trainers.train_dmc --method dms --window 16 --ratio 4 --data books/train --out small-dms

A model of your own, with settings of the papers' order of size:

    accelerate launch -m hf_kvcache.trainers.train_dmc --model ID_OR_PATH --data texts --method dms --ratio 8 \
        --window 256 --sequence 4096 --batch-size 1 --accumulation 16 --lr 3e-5 --final-lr 3e-6 --ramp-steps 700 \
        --bf16 --gradient-checkpointing --out model-dms

Three phases. Attention learns to do without the channel that decisions are read from (a borrowed one, or one whose
rows are replaced); then the compression ratio that a hinge loss asks for rises to `--ratio`; then it stays there, and
the learning rate falls. What a step does depends on its number alone: stop at any time and go on with `--resume`.
A model that is retrofitted already goes on from `--start-ratio`. `--method none` is the control: the same steps on the
same tokens without compression. `training.json` beside the model has the log, and how much every head compresses.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainingArguments, set_seed

from hf_kvcache import compat
from hf_kvcache.adapters import files, save_adapter
from hf_kvcache.dmc.files import save
from hf_kvcache.dmc.retrofitting import retrofits
from hf_kvcache.trainers.common import parser_of, train, training_arguments, write_report
from hf_kvcache.trainers.dmc_data import load_batches
from hf_kvcache.trainers.dmc_losses import ratio_of
from hf_kvcache.trainers.dmc_model import load_model, prepare, teacher_of
from hf_kvcache.trainers.dmc_options import Method, Optimisation, Texts, check
from hf_kvcache.trainers.dmc_schedule import Schedule
from hf_kvcache.trainers.dmc_trainer import RetrofitTrainer


def main(args: list[str] | None = None) -> dict:
    """Train and save; returns what `training.json` says."""
    parser = parser_of(__doc__, Texts, Method, Optimisation)
    texts, method, optimisation = parser.parse_args_into_dataclasses(args)
    check(method, optimisation)

    model, dtype = load_model(texts.model, texts.attn, keeps_dtype=method.adapter and optimisation.bf16)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    teacher = teacher_of(model, method, texts.attn)
    # new weights (LoRA's) are drawn: in all processes, and when the run is repeated, the same
    set_seed(optimisation.seed)
    prepare(model, method, optimisation)
    schedule = Schedule(
        optimisation.zero_steps,
        optimisation.ramp_steps,
        optimisation.solid_steps,
        method.start_ratio,
        method.ratio,
        optimisation.final_lr / optimisation.lr,
    )
    arguments = arguments_of(texts.out, optimisation, schedule.n_steps)
    batches = load_batches(texts, optimisation, tokenizer, schedule.n_steps, arguments.world_size)

    trainer = RetrofitTrainer(
        schedule=schedule,
        method=method,
        optimisation=optimisation,
        teacher=teacher,
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: items[0],
    )
    seconds = train(trainer, optimisation.resume)

    tokens = schedule.n_steps * texts.sequence * optimisation.batch_size * optimisation.accumulation
    report = {"seconds": seconds, "tokens": tokens * arguments.world_size}
    if trainer.shares is not None:
        report |= {"ratio": ratio_of(trainer.shares), "target": method.ratio}
        report["shares"] = [[round(share, 4) for share in layer] for layer in trainer.shares.tolist()]
    model = trained_model(trainer, texts, method, optimisation)
    if model is not None:
        wanted = {"source": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[optimisation.save_dtype]
        save_model(model, wanted, texts.out, tokenizer, method.adapter, report)
        write_report(texts.out, report, trainer, texts, method, optimisation)
        print(json.dumps({name: report[name] for name in ("seconds", "ratio", "shares") if name in report}))
    return report


def arguments_of(out: Path, optimisation: Optimisation, n_steps: int) -> TrainingArguments:
    return training_arguments(
        out,
        optimisation,
        max_steps=n_steps,
        # an item of the dataset is a batch already
        per_device_train_batch_size=1,
        learning_rate=optimisation.lr,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.clip_norm,
        **compat.checkpointing(optimisation.gradient_checkpointing),
        save_strategy="steps" if optimisation.save_steps else "no",
        save_steps=optimisation.save_steps or 500,
        # all weights have a gradient at every step, see `RetrofitTrainer.compute_loss`
        ddp_find_unused_parameters=False,
    )


def trained_model(trainer: RetrofitTrainer, texts: Texts, method: Method, optimisation: Optimisation):
    """The model with all its weights; None on processes that need not save it."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model) if trainer.is_world_process_zero() else None
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    model, _ = load_model(texts.model, texts.attn)
    prepare(model, method, optimisation)
    model.load_state_dict(state)
    return model


def save_model(model, dtype: torch.dtype, out: Path, tokenizer, is_adapter: bool, report: dict) -> None:
    """The whole model with what is known of the retrofit; or what has been added to it."""
    # the Trainer turns it off while it trains
    model.config.use_cache = True
    if not retrofits(model):
        model.to(dtype).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    facts = {"target_ratio": report["target"], "achieved_ratio": report["ratio"], "tokens_seen": report["tokens"]}
    if not is_adapter:
        save(model.to(dtype), out, tokenizer, **facts)
        return
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if lora:
        # what PEFT calls weights of the adapter that is loaded
        lora = {files.ROOT + name.replace(".lora.weight", ".weight"): p for name, p in lora.items()}
        config = model.peft_config["lora"]
        config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
        config.save_pretrained(out / "lora")
        save_file({name: p.detach().cpu().contiguous() for name, p in lora.items()}, out / "lora" / files.TENSORS)
    save_adapter(model, out, lora="lora" if lora else None, **facts)


if __name__ == "__main__":
    main()
