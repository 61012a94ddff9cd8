"""Pretrain the embedded small model: English prose and one-hop retrieval, on CPU or GPU.

    python -m hf_kvcache.trainers.pretrain_small --books books/train --valid_books books/valid --output small

Both folders hold plain .txt files. The first run trains the tokenizer and tokenises the books.
Stop at any time and go on with `--resume`; `--steps` may differ then, so that the decay ends in time.
`accelerate launch -m` runs the same command on several devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_kvcache.eval.retrieval import (
    Ledger,
    build_prompt,
    build_prompts,
    draw_n_entries,
    exact_match,
    ledger_tokens,
)
from hf_kvcache.trainers.common import parser_of, place_of, read_texts, train, training_arguments

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MAX_TOKENS = 16384


@dataclass
class PretrainConfig:
    """What to train, on what, for how long."""

    books: Path = HfArg(help="folder of .txt files to train on")
    valid_books: Path = HfArg(help="folder of .txt files held out")
    output: Path = HfArg(help="folder for the model, its tokenizer and the checkpoints")
    steps: int = HfArg(default=6000, help="optimiser steps in all")
    warmup_steps: int = HfArg(default=150, help="steps of linear warmup")
    decay_steps: int = HfArg(default=1500, help="last steps, the learning rate falling to zero")
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    tokens_per_batch: int = HfArg(default=4096, help="tokens of one step on one device")
    curriculum: list[str] = HfArg(
        default_factory=lambda: ["128x800", "256x400", "512x500", "1024x1000", "2048x2500", "4096x0"],
        help="sequence length x steps in turn; the last length stays to the end",
    )
    prose_share: float = HfArg(default=0.25, help="share of sequences without a ledger")
    answer_weight: float = HfArg(default=1.0, help="weight of the mean loss on answers")
    vocab_size: int = HfArg(default=4096, help="tokens of the tokenizer, ledger included")
    hidden_size: int = 256
    intermediate_size: int = 640
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    bf16: bool = HfArg(default=True, help="bf16 autocast over fp32 weights")
    eval_steps: int = 250
    eval_batches: int = HfArg(default=8, help="held-out batches of 4 windows of 1,024 tokens")
    eval_lengths: list[int] = HfArg(default_factory=lambda: [512, 1024, 2048])
    save_steps: int = 250
    seed: int = 0
    resume: bool = HfArg(default=False, help="go on from the last checkpoint in --output")


def train_tokenizer(files: list[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the books, then the ledger as ordinary added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ledger_tokens()),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ledger_tokens()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """The tokenizer in the output folder, trained on the books when there is none."""
    if not (config.output / "tokenizer.json").exists():
        train_tokenizer(sorted(config.books.glob("*.txt")), config.vocab_size).save_pretrained(config.output)
    return PreTrainedTokenizerFast.from_pretrained(config.output)


def load_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, saved: Path) -> np.ndarray:
    """All books of a folder, `eos` after each, as one uint16 stream `[n]`; kept in `saved`."""
    if not saved.exists():
        ids = tokenizer(read_texts(folder), add_special_tokens=False)["input_ids"]
        np.save(saved, np.concatenate([[*book, tokenizer.eos_token_id] for book in ids]).astype(np.uint16))
    return np.load(saved, mmap_mode="r")


class LedgerMix(torch.utils.data.Dataset):
    """Item `i` is the whole batch of step `i`: windows of prose, most with a ledger and its questions.

    The mean loss over prose has weight 1, the mean loss over answers `answer_weight`. Entries, questions and
    the spaces before them are noise to predict and have weight 0.
    """

    def __init__(self, stream: np.ndarray, ledger: Ledger, config: PretrainConfig):
        self.stream, self.ledger, self.config = stream, ledger, config
        self.is_ledger = np.zeros(len(ledger.starts_word), dtype=bool)
        self.is_ledger[ledger.entries] = self.is_ledger[ledger.questions] = True
        self.is_answer = np.zeros_like(self.is_ledger)
        self.is_answer[ledger.answers] = True
        stages = [tuple(map(int, stage.split("x"))) for stage in config.curriculum]
        self.lengths = [length for length, _ in stages]
        self.until = np.cumsum([steps for _, steps in stages[:-1]])

    def __len__(self) -> int:
        # one item per step and process
        return self.config.steps * int(os.environ.get("WORLD_SIZE", 1))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        length = self.lengths[int(np.searchsorted(self.until, i, side="right"))]
        n_rows = max(1, self.config.tokens_per_batch // length)
        rng = np.random.default_rng([self.config.seed, i])
        ids = np.stack([self.row(i * n_rows + j, length, rng) for j in range(n_rows)])
        return self.weigh(ids)

    def row(self, i: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """`length + 1` token ids, so that `length` of them can be predicted."""
        start = place_of(i, len(self.stream) - length)
        prose = self.stream[start : start + length].astype(np.int64)
        if rng.random() < self.config.prose_share:
            return np.concatenate([[self.ledger.bos], prose])
        # with two entries in sight their values alone say something: from there the hop is learned
        n_entries = draw_n_entries(rng, low=2, high=min(64, length // 16))
        n_questions = min(n_entries, length // 16)
        prompt = build_prompt(self.ledger, prose, length + 1 - 3 * n_questions, n_entries, n_questions, rng)
        return prompt.with_answers()[0].numpy()

    def weigh(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Inputs, labels one token on, and the weight of each label's loss, all `[B, T]`."""
        before_ledger = np.pad(self.is_ledger[ids][:, 1:], ((0, 0), (0, 1)))
        answer = self.is_answer[ids][:, 1:]
        prose = ~(self.is_ledger[ids] | before_ledger)[:, 1:] & ~answer
        weights = prose / prose.sum() + self.config.answer_weight * answer / max(1, answer.sum())
        return {
            "input_ids": torch.from_numpy(ids[:, :-1]),
            "labels": torch.from_numpy(ids[:, 1:]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }


def prose_batches(stream: np.ndarray, mix: LedgerMix, n_batches: int, length: int = 1024) -> list[dict]:
    """Held-out prose windows spread evenly over the stream, four to a batch."""
    starts = np.linspace(0, len(stream) - length - 1, 4 * n_batches).astype(int)
    rows = np.stack([np.append(mix.ledger.bos, stream[start : start + length]) for start in starts])
    return [mix.weigh(batch.astype(np.int64)) for batch in np.split(rows, n_batches)]


class LedgerTrainer(Trainer):
    """Trainer with a weighted loss, and with retrieval among its evaluation metrics."""

    def __init__(self, prompts: dict, **kwargs):
        super().__init__(**kwargs)
        self.prompts = prompts
        # the loss is a mean per batch, not a sum over tokens
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits = outputs.logits.float().flatten(0, 1)  # [B * T, vocab]
        losses = F.cross_entropy(logits, inputs["labels"].flatten(), reduction="none")
        loss = (losses * inputs["weights"].flatten()).sum()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self.model.eval()
        scores = {f"eval_retrieval_{n}": exact_match(self.model, p) for n, p in self.prompts.items()}
        self.log(scores)
        return metrics | scores


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention, head size 64 and tied embeddings."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=64,
            max_position_embeddings=MAX_TOKENS,
            # slow rotation leaves dimensions that match content at any distance
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def share_ledger_parts(model: LlamaForCausalLM, ledger: Ledger) -> None:
    """Start an entry as the sum of its question and its answer, so that 8 entries learn a key together."""
    rows = model.get_input_embeddings().weight.data
    keys, values = rows[ledger.questions], rows[ledger.answers]  # [64, D], [8, D]
    rows[ledger.entries] = (keys[:, None] + values) * 0.5**0.5


def arguments_of(config: PretrainConfig) -> TrainingArguments:
    """Warmup, constant rate, decay; a log line, an evaluation and a checkpoint at fixed steps."""
    return training_arguments(
        config.output,
        config,
        max_steps=config.steps,
        # an item of the dataset is a batch already
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": config.decay_steps, "decay_type": "linear"},
        warmup_steps=config.warmup_steps,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        logging_steps=50,
    )


def main(args: list[str] | None = None) -> None:
    (config,) = parser_of(__doc__, PretrainConfig).parse_args_into_dataclasses(args)
    config.output.mkdir(parents=True, exist_ok=True)

    tokenizer = load_tokenizer(config)
    stream = load_tokens(config.books, tokenizer, config.output / "train_tokens.npy")
    held_out = load_tokens(config.valid_books, tokenizer, config.output / "valid_tokens.npy")
    ledger = Ledger.from_tokenizer(tokenizer)
    mix = LedgerMix(stream, ledger, config)

    model = build_model(config, tokenizer)
    share_ledger_parts(model, ledger)
    trainer = LedgerTrainer(
        model=model,
        args=arguments_of(config),
        train_dataset=mix,
        eval_dataset=prose_batches(held_out, mix, config.eval_batches),
        data_collator=lambda items: items[0],
        prompts={n: build_prompts(ledger, held_out, n, n_prompts=4) for n in config.eval_lengths},
    )
    train(trainer, config.resume)

    # the Trainer turns it off while it trains
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(config.output)


if __name__ == "__main__":
    main()
