"""The phases of a retrofit: what holds during a step is a function of its number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import TrainerCallback

from hf_kvcache.dmc.objective import ramp
from hf_kvcache.dmc.retrofitting import retrofits
from hf_kvcache.dmc.training import zero_rows


@dataclass(frozen=True)
class Moment:
    """What holds during one step.

    Attributes:
        fade: factor on the channel that is taken out.
        compresses: whether decisions count.
        ratio: compression ratio that is asked for.
        lr: factor on the learning rate.
    """

    fade: float
    compresses: bool
    ratio: float
    lr: float


@dataclass(frozen=True)
class Schedule:
    """The three phases; what a step does is a function of its number."""

    zero_steps: int
    ramp_steps: int
    solid_steps: int
    start_ratio: float
    ratio: float
    final_lr: float  # as a share of the first

    @property
    def n_steps(self) -> int:
        return self.zero_steps + self.ramp_steps + self.solid_steps

    @property
    def end_of_ramp(self) -> int:
        return self.zero_steps + self.ramp_steps

    def at(self, step: int) -> Moment:
        if step < self.zero_steps:
            # gone after 80 % of the phase, so that the rest is learned without it
            return Moment(max(0.0, 1 - step / (0.8 * self.zero_steps)), False, 1.0, 1.0)
        ratio = ramp(step - self.zero_steps, self.ramp_steps, self.ratio, self.start_ratio)
        done = min(1.0, max(0, step - self.end_of_ramp) / max(1, self.solid_steps))
        lr = self.final_lr + (1 - self.final_lr) * (1 + np.cos(np.pi * done)) / 2
        return Moment(0.0, True, ratio, float(lr))


class Conduct(TrainerCallback):
    """Puts the model in the state of its step; sees that the ends of phases are logged."""

    def __init__(self, model, schedule: Schedule):
        self.model, self.schedule = model, schedule

    def on_step_begin(self, args, state, control, **kwargs):
        now = self.schedule.at(state.global_step)
        for child in retrofits(self.model).values():
            child.fade, child.compresses = now.fade, now.compresses

    def on_step_end(self, args, state, control, **kwargs):
        # before the checkpoint of this step is written
        if state.global_step == self.schedule.zero_steps:
            is_borrowed = [c.settings.decision == "borrowed" for c in retrofits(self.model).values()]
            if is_borrowed and all(is_borrowed):
                zero_rows(self.model)
        if state.global_step in (self.schedule.end_of_ramp, self.schedule.n_steps):
            control.should_log = True
