"""The Trainer of retrofits."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import torch
from transformers import Trainer

from hf_kvcache.dmc.objective import divergence, hinge, merged_share
from hf_kvcache.dmc.retrofitting import retrofits
from hf_kvcache.dmc.training import compression_off, draw_noise
from hf_kvcache.trainers.dmc_losses import by_rows, cross_entropy, hard_share, ratio_of
from hf_kvcache.trainers.dmc_model import is_decision
from hf_kvcache.trainers.dmc_options import Method, Optimisation
from hf_kvcache.trainers.dmc_schedule import Conduct, Schedule
from hf_kvcache.warn import warn_once


class RetrofitTrainer(Trainer):
    """Trainer whose loss is language modelling or distillation, and the hinge; logs what every layer compresses."""

    def __init__(self, schedule: Schedule, method: Method, optimisation: Optimisation, teacher=None, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher if teacher is None else teacher.to(self.args.device)
        self.schedule, self.method, self.optimisation = schedule, method, optimisation
        self.parts = defaultdict(list)
        self.shares: torch.Tensor | None = None
        self._micro = (-1, 0)
        # the loss is a mean per batch, not a sum over tokens
        self.model_accepts_loss_kwargs = False
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                "retrofits are trained under FSDP 2, of which trainers/configs/fsdp.yaml is an example; this is FSDP "
                f"{plugin.fsdp_version}"
            )
        self.add_callback(Conduct(self.model, schedule))

    def _seed(self) -> int:
        """Of the noise of this batch: the same whether processes share batches or one has them in turn."""
        step, n = self._micro
        step, n = (self.state.global_step, n + 1) if step == self.state.global_step else (self.state.global_step, 0)
        self._micro = step, n
        index = n * self.args.world_size + self.args.process_index
        return int(np.random.SeedSequence([self.optimisation.seed, step, index]).generate_state(1)[0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = self.accelerator.unwrap_model(model)
        ids, labels, weights = inputs["input_ids"], inputs["labels"].flatten(), inputs["weights"].flatten()
        now, children = self.schedule.at(self.state.global_step), retrofits(own)
        draw_noise(own, *ids.shape, self._seed(), ids.device)
        if self.method.loss == "kd":
            with teaching(own), torch.no_grad():
                teacher = (self.teacher or model)(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        outputs = model(input_ids=ids, use_cache=False)
        logits = outputs.logits.flatten(0, 1)  # [B * T, vocabulary]
        if self.method.loss == "kd":
            loss = by_rows(lambda s, t: divergence(s, t, self.method.kd_direction), weights, logits, teacher)
            with torch.no_grad():
                # not trained on, but it shows whether a teacher leads astray
                self.parts["ce"].append(by_rows(cross_entropy, weights, logits, labels))
        else:
            loss = by_rows(cross_entropy, weights, logits, labels)
        self.parts[self.method.loss].append(loss.detach())
        if children and now.compresses:
            calls = {i: child.call for i, child in children.items()}
            behind = hinge(merged_share(calls), now.ratio, self.method.constant_ratio)
            self.parts["hinge"].append(behind.detach())
            self.parts["shares"].append(torch.stack([hard_share(call) for call in calls.values()]))
            loss = loss + self.method.hinge_weight * behind
        elif children:
            # DDP waits for the gradient of every weight
            loss = loss + 0.0 * sum(own_part(w).sum() for child in children.values() for w in child.parameters())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.parts:
            means = {
                name: self.accelerator.gather(torch.stack(values).mean(0)[None]).mean(0)
                for name, values in self.parts.items()
            }
            self.parts.clear()
            self.shares = means.pop("shares", None)
            logs |= {name: round(mean.item(), 4) for name, mean in means.items()}
            if self.shares is not None:
                logs |= {
                    "target": round(self.schedule.at(self.state.global_step - 1).ratio, 3),
                    "ratio": ratio_of(self.shares),
                    "ratio_by_layer": [ratio_of(share) for share in self.shares],
                }
                self._warn(logs)
        super().log(logs, *args, **kwargs)

    def _warn(self, logs) -> None:
        """Say so when the ramp is over and nothing has happened."""
        if self.state.global_step == self.schedule.end_of_ramp and self.schedule.ratio > 1.5 and logs["ratio"] < 1.1:
            scale = next(iter(retrofits(self.model).values())).settings.scale
            warn_once(
                f"the ramp is over and asks for {self.schedule.ratio:g} tokens per row, but the model keeps "
                f"{logs['ratio']:g}: decisions get next to no gradient; raise --scale (it is {scale:g}), "
                "--hinge-weight or the number of steps"
            )

    def create_optimizer(self, model=None):
        """AdamW; rows of decisions learn faster, and without decay."""
        if self.optimizer is None:
            model, lr = self.model if model is None else model, self.args.learning_rate
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            deciding = [p for name, p in named.items() if is_decision(name)]
            others = [p for name, p in named.items() if not is_decision(name)]
            groups = [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": self.args.weight_decay},
                {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
                {"params": deciding, "weight_decay": 0.0, "lr": lr * self.optimisation.decision_lr_factor},
            ]
            betas = self.args.adam_beta1, self.args.adam_beta2
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.at(step).lr)
        return self.lr_scheduler


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight, under FSDP 2."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@contextmanager
def teaching(model):
    """The same weights without compression, and with the channel that is being taken out."""
    children = list(retrofits(model).values())
    fades = [child.fade for child in children]
    with compression_off(model):
        for child in children:
            # afterwards the channel is gone for the teacher, too
            child.fade = float(child.fade > 0)
        try:
            yield
        finally:
            for child, fade in zip(children, fades):
                child.fade = fade
