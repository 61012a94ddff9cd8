"""Train the projections of a low-rank KV cache by distillation (MatryoshkaKV, arXiv 2410.14731).

    python -m hf_kvcache.trainers.train_projections --model ID_OR_PATH --text train.txt --output adapter

Two phases. First the principal directions of keys and values on the text (or the bases of a calibrated adapter:
`--bases`). Then, the model frozen, an orthogonal matrix per layer and KV head turns those directions so that the model
behind the projection predicts what it predicts without; every step draws other ranks, so that each prefix is a basis.

The output is a PEFT adapter: `Bases.load`, `PeftModel.from_pretrained` and `model.load_adapter` read it.
Stop at any time and go on with `--resume`. `accelerate launch -m` runs the same command on several devices.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hf_kvcache import compat
from hf_kvcache.adapters.bases import Bases
from hf_kvcache.adapters.modules import full_attentions
from hf_kvcache.attention.interface import kv_attention, kv_mask
from hf_kvcache.calibration import observe
from hf_kvcache.codecs.basis import Basis, by_group
from hf_kvcache.codecs.fitting import Moments
from hf_kvcache.rope import rotate
from hf_kvcache.rope_of_model import rope_of
from hf_kvcache.trainers.common import PartsTrainer, Steps, load_model, parser_of, training_arguments

IMPLEMENTATION = "hf_kvcache_projected"  # private: only the model that is being trained is loaded with it
RANK_STEP = 16


@dataclass
class Texts:
    """What to train on."""

    _argument_group_name: ClassVar[str] = "model and text"
    model: str = HfArg(help="name or path of the model")
    text: list[Path] = HfArg(help="plain text files")
    output: Path = HfArg(help="folder for the adapter and the checkpoints")
    length: int = HfArg(default=2048, help="tokens of a window")
    valid_share: float = HfArg(default=0.1, help="share of the tokens, at the end, that is held out")
    eval_windows: int = HfArg(default=8, help="held-out windows")
    eval_ranks: list[int] = HfArg(
        default_factory=lambda: [64, 48, 32, 16], help="latent channels per KV head to evaluate"
    )


@dataclass
class Projections:
    """Which projections."""

    _argument_group_name: ClassVar[str] = "projections"
    bases: str | None = HfArg(default=None, help="calibrated adapter to start from")
    rope: str = HfArg(default="post", help="project keys before ('pre') or after ('post') RoPE")
    group_size_k: int = HfArg(default=1, help="KV heads that share latents of keys")
    group_size_v: int = HfArg(default=1, help="KV heads that share latents of values")
    centre: bool = HfArg(default=True, help="subtract a mean, which is trained too")
    pca_windows: int = HfArg(default=32, help="windows for the principal directions")


@dataclass
class Optimisation(Steps):
    """How to train; the defaults are the paper's."""

    steps: int = 1000
    accumulation: int = HfArg(default=16, help="batches whose gradients are added")
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    kl_weight: float = HfArg(
        default=0.25, help="weight of KL(teacher || student), the rest is CE; 1 where text is scarce"
    )
    eval_steps: int = HfArg(default=0, help="steps between evaluations; 0 is start and end only")


# -- projections -------------------------------------------------------------------------------------------------------


class Rotation(nn.Module):
    """An orthogonal matrix per group of heads, of which the first `r` columns span the subspace of rank `r`.

    `U = U0 Cayley(A)`, `Cayley(A) = (I - A / 2)⁻¹ (I + A / 2)` with `A` skew-symmetric, zero at the start.

    Args:
        start: `U0`, `[G, n, n]`.
        mean: `[G, n]`, or None.
    """

    def __init__(self, start: torch.Tensor, mean: torch.Tensor | None):
        super().__init__()
        self.register_buffer("start", start.float().contiguous())
        # only what is above the diagonal counts
        self.skew = nn.Parameter(torch.zeros_like(self.start))
        self.mean = None if mean is None else nn.Parameter(mean.float())

    def matrix(self) -> torch.Tensor:
        """`U`, `[G, n, n]`."""
        with torch.autocast(self.skew.device.type, enabled=False):
            upper = self.skew.triu(1)
            half, one = (upper - upper.mT) / 2, torch.eye(upper.shape[-1], device=upper.device)
            return self.start @ torch.linalg.solve(one - half, one + half)

    def forward(self, x: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        """Project `[B, Hkv, N, D]` onto the first `ranks` `[G]` directions."""
        n_groups, width = self.start.shape[:2]
        keep = torch.arange(width, device=x.device) < ranks.to(x.device).unsqueeze(1)  # [G, n]
        u = self.matrix().to(x.dtype)
        rows = by_group(x, x.shape[1] // n_groups)  # [B, G, N, n]
        mean = 0 if self.mean is None else self.mean.to(x.dtype).unsqueeze(1)
        rows = ((rows - mean) @ u * keep.unsqueeze(1)) @ u.mT + mean
        return rows.unflatten(3, (-1, x.shape[3])).transpose(2, 3).flatten(1, 2)


class Site(nn.Module):
    """What stands between an attention module and its keys and values: sees them, and may change them.

    Args:
        module: the attention module.
        head_dim: `D`.
        rope: "pre" takes keys back before RoPE first.
    """

    def __init__(self, module: nn.Module, head_dim: int, rope: str):
        super().__init__()
        self.rotary = rope_of(module, head_dim) if rope == "pre" else None

    def forward(self, keys, values, positions):
        if self.rotary is None:
            return self.see(keys, values)
        inv_freq, scaling = self.rotary.inv_freq, self.rotary.scaling
        angles = positions[:, None, :, None].float() * inv_freq.to(positions.device, torch.float32)
        cos, sin = angles.cos(), angles.sin()
        plain, values = self.see(rotate(keys.float(), cos / scaling, -sin / scaling), values)
        return rotate(plain, cos * scaling, sin * scaling).to(keys.dtype), values


class Projector(Site):
    """Projects the keys and values of one layer."""

    def __init__(self, module, head_dim, rope, keys: Rotation, values: Rotation):
        super().__init__(module, head_dim, rope)
        self.k, self.v = keys, values
        self.ranks: dict[str, torch.Tensor] = {}  # [G] by side

    def see(self, keys, values):
        return self.k(keys, self.ranks["k"]), self.v(values, self.ranks["v"])

    def draw(self) -> None:
        """Ranks at random, for every group its own: multiples of 16."""
        for side, rotation in (("k", self.k), ("v", self.v)):
            n_groups, width = rotation.start.shape[:2]
            step = min(RANK_STEP, width)
            self.ranks[side] = torch.randint(1, width // step + 1, (n_groups,)) * step

    def fix(self, rank: int, head_dim: int) -> None:
        """The same share for every group: `rank` channels per KV head."""
        for side, rotation in (("k", self.k), ("v", self.v)):
            n_groups, width = rotation.start.shape[:2]
            self.ranks[side] = torch.full((n_groups,), rank * width // head_dim)


def projected_attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """sdpa over what the module's `Site` makes of keys and values."""
    site = getattr(module, "kv_site", None)
    if site is not None:
        if position_ids is None:
            position_ids = torch.arange(key.shape[2], device=key.device).unsqueeze(0)
        key, value = site(key, value, position_ids)
    return kv_attention(module, query, key, value, attention_mask, position_ids=position_ids, **kwargs)


def place(model: nn.Module, sites: dict[int, Site] | None) -> None:
    """Set the sites of a model's layers, or take all away."""
    for i, attention in full_attentions(model).items():
        # not a submodule: the model is frozen, and is saved by nobody
        object.__setattr__(attention.module, "kv_site", None if sites is None else sites[i])


# -- phase 1: principal directions -------------------------------------------------------------------------------------


def collect(
    model: nn.Module, windows: torch.Tensor, rope: str, group_sizes: dict[str, int]
) -> dict[int, dict[str, Moments]]:
    """Moments of the keys and values of every full-attention layer over windows `[n, T]`, by layer and side."""
    seen = observe(model, windows.split(1), rope=rope, group_sizes=group_sizes)
    return {i: layer.rows for i, layer in seen.items()}


def start_of(moments: Moments, centre: bool, basis: Basis | None) -> Rotation:
    """The orthogonal matrix to begin with: principal directions, or those of a basis."""
    if basis is not None:
        # the columns of Q span, one by one, what those of `down` span; what is missing to a square is added
        u = torch.linalg.qr(basis.down.double(), mode="complete").Q
        return Rotation(u, basis.mean)
    u = torch.linalg.eigh(moments.covariance(centre).double()).eigenvectors.flip(-1)
    return Rotation(u, moments.mean if centre else None)


@torch.no_grad()
def basis_of(rotation: Rotation, moments: Moments, group_size: int) -> Basis:
    """The directions of a rotation as a basis, its latents scaled so that they round well (Palu, arXiv 2407.21118)."""
    u = rotation.matrix().double()
    covariance = moments.covariance(rotation.mean is not None).to(u)
    deviation = (u * (covariance @ u)).sum(1).clamp(min=0).sqrt()  # [G, n]
    scale = deviation.clamp(min=1e-5 * deviation.max().item()).clamp(min=1e-5).sqrt().unsqueeze(1)
    up = (u * scale).mT.unflatten(2, (group_size, -1)).transpose(1, 2)
    mean = {} if rotation.mean is None else {"mean": rotation.mean}
    return Basis(**{name: t.float().cpu().contiguous() for name, t in {"down": u / scale, "up": up, **mean}.items()})


# -- phase 2: distillation ---------------------------------------------------------------------------------------------


class Distiller(nn.Module):
    """The frozen model, with and without the projections. Only the projections are parameters of this module."""

    def __init__(self, model: nn.Module, projectors: dict[int, Projector], kl_weight: float):
        super().__init__()
        self.projectors = nn.ModuleDict({str(i): projector for i, projector in projectors.items()})
        # not a submodule: neither trained, nor synchronised, nor saved with the checkpoints
        self.__dict__["model"] = model.requires_grad_(False).eval()
        self.kl_weight = kl_weight

    def _sites(self):
        return {int(i): projector for i, projector in self.projectors.items()}

    @torch.no_grad()
    def teacher(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the model as it is, `[B, T, vocabulary]`."""
        place(self.model, None)
        return self.model(ids, use_cache=False).logits.float().log_softmax(-1)

    def student(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the model behind the projections, at the ranks that are set."""
        place(self.model, self._sites())
        logits = self.model(ids, use_cache=False).logits
        place(self.model, None)
        return logits.float().log_softmax(-1)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses at ranks drawn at random: `loss`, and its parts `kl` and `ce`, means per token."""
        for projector in self.projectors.values():
            projector.draw()
        expected, predicted = self.teacher(input_ids), self.student(input_ids)
        kl = F.kl_div(predicted.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True)
        ce = F.nll_loss(predicted[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return {"loss": self.kl_weight * kl + (1 - self.kl_weight) * ce, "kl": kl.detach(), "ce": ce.detach()}

    @torch.no_grad()
    def divergence(self, windows: torch.Tensor, ranks: list[int], head_dim: int) -> dict[int, float]:
        """Mean KL(teacher || student) per token over windows `[n, T]`, in nats, by rank."""
        total: dict[int, float] = defaultdict(float)
        for window in windows:
            ids = window[None].to(self.model.device)
            expected = self.teacher(ids)[0]
            for rank in ranks:
                for projector in self.projectors.values():
                    projector.fix(rank, head_dim)
                total[rank] += F.kl_div(self.student(ids)[0], expected, reduction="batchmean", log_target=True).item()
        return {rank: kl / len(windows) for rank, kl in total.items()}


class Windows(torch.utils.data.Dataset):
    """Windows at random places of a stream of tokens, each the same whenever it is asked for."""

    def __init__(self, stream: torch.Tensor, length: int, bos: int | None, n: int, seed: int):
        self.stream, self.length, self.bos, self.n, self.seed = stream, length, bos, n, seed
        if len(stream) <= length:
            raise ValueError(f"the text has {len(stream)} tokens to train on, a window needs {length}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = int(np.random.default_rng([self.seed, i]).integers(len(self.stream) - self.length))
        return {"input_ids": self.window(start)}

    def window(self, start: int) -> torch.Tensor:
        """`length` tokens, the first one `bos` where the model has one."""
        ids = self.stream[start : start + self.length]
        return ids if self.bos is None else torch.cat([ids.new_tensor([self.bos]), ids[:-1]])

    def spread(self, n: int) -> torch.Tensor:
        """`n` windows spread evenly, `[n, length]`."""
        return torch.stack([self.window(int(i)) for i in np.linspace(0, len(self.stream) - self.length, n)])


class ProjectionTrainer(PartsTrainer):
    """Trainer that evaluates the divergence at fixed ranks."""

    def __init__(self, eval_ranks: list[int], head_dim: int, **kwargs):
        super().__init__(**kwargs)
        self.eval_ranks, self.head_dim = eval_ranks, head_dim

    def evaluate(self, *args, **kwargs):
        distiller = self.accelerator.unwrap_model(self.model)
        scores = distiller.divergence(self.eval_dataset, self.eval_ranks, self.head_dim)
        metrics = {f"eval_kl_rank_{rank}": kl for rank, kl in scores.items()}
        self.log(dict(metrics))
        return metrics


def load_stream(files: list[Path], tokenizer) -> torch.Tensor:
    """All files as one stream of token ids `[n]`."""
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    return torch.tensor([i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids])


def arguments_of(texts: Texts, optimisation: Optimisation) -> TrainingArguments:
    """Warmup and cosine, no weight decay: the parameters are angles."""
    return training_arguments(
        texts.output,
        optimisation,
        max_steps=optimisation.steps,
        train_sampling_strategy="random",
        learning_rate=optimisation.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=optimisation.warmup_steps,
        weight_decay=0.0,
        eval_strategy="steps" if optimisation.eval_steps else "no",
        eval_steps=optimisation.eval_steps or None,
    )


def main(args: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train and save; returns the held-out divergence by rank, of the start ("before") and of the end ("after")."""
    parser = parser_of(__doc__, Texts, Projections, Optimisation)
    texts, projections, optimisation = parser.parse_args_into_dataclasses(args)
    arguments = arguments_of(texts, optimisation)
    compat.register_attention(IMPLEMENTATION, projected_attention)
    compat.register_mask(IMPLEMENTATION, kv_mask)

    model, tokenizer = load_model(texts.model, IMPLEMENTATION, optimisation, arguments)
    stream = load_stream(texts.text, tokenizer)
    n_train = int(len(stream) * (1 - texts.valid_share))
    n_items = optimisation.steps * optimisation.batch_size * optimisation.accumulation * arguments.world_size
    make = {"length": texts.length, "bos": tokenizer.bos_token_id, "n": n_items, "seed": optimisation.seed}
    windows, held_out = Windows(stream[:n_train], **make), Windows(stream[n_train:], **make)

    given = None if projections.bases is None else Bases.load(projections.bases)
    if given is not None:
        given.check_model(model)
    rope = projections.rope if given is None else given.rope
    sizes = {"k": projections.group_size_k, "v": projections.group_size_v} if given is None else given.group_sizes
    moments = collect(model, windows.spread(projections.pca_windows), rope, sizes)
    attentions = full_attentions(model)
    projectors = {}
    for i, own in moments.items():
        sides = {
            side: start_of(m, projections.centre, None if given is None else given.of(i, side))
            for side, m in own.items()
        }
        projectors[i] = Projector(attentions[i].module, attentions[i].head_dim, rope, sides["k"], sides["v"])

    trainer = ProjectionTrainer(
        model=Distiller(model, projectors, optimisation.kl_weight),
        args=arguments,
        train_dataset=windows,
        eval_dataset=held_out.spread(texts.eval_windows),
        eval_ranks=texts.eval_ranks,
        head_dim=next(iter(attentions.values())).head_dim,
    )
    before = trainer.evaluate()
    # the Trainer shows, and keeps, nothing that is logged before it trains
    print(json.dumps({"before": before}), flush=True)
    trainer.train(resume_from_checkpoint=optimisation.resume)
    after = trainer.evaluate()
    trainer.save_state()

    layers = {
        i: {side: basis_of(getattr(projectors[i], side), m, sizes[side]) for side, m in own.items()}
        for i, own in moments.items()
    }
    bases = Bases(layers, rope, budget={"method": "matryoshka", "steps": optimisation.steps, **after})
    if trainer.is_world_process_zero():
        bases.made_for(model, model.name_or_path).save(texts.output, model)
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
