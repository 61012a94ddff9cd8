"""Calibration of low-rank bases: what rows look like, which directions matter, how many of them to keep where."""

from hf_kvcache.calibration.fit import fit_bases
from hf_kvcache.calibration.observe import LayerMoments, logits_behind, observe

__all__ = ["LayerMoments", "fit_bases", "logits_behind", "observe"]
