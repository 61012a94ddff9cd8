"""What a frozen model says of prompts, written once and read as often as heads are trained on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_kvcache.calibration.judging import Judge, judge
from hf_kvcache.calibration.prompts import Arrange

ABOUT = "recorded.json"


class Recorded(torch.utils.data.Dataset):
    """Features and targets of prompts, a file for each; item `i` is prompt `i` modulo their number, in turns.

    Args:
        folder: made or gone on with.
        n: prompts.
        n_items: of the dataset; every time all prompts have come, they come in another order.
        about: what the files depend on: model, text, sizes, seed.
        targets: names of the targets that are read.
        seed: of the orders.

    Raises:
        ValueError: the folder was recorded otherwise; names what differs.
    """

    def __init__(self, folder: Path, n: int, n_items: int, about: Mapping, targets: list[str], seed: int = 0):
        self.folder, self.n, self.n_items, self.targets, self.seed = folder, n, n_items, targets, seed
        folder.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(dict(about), default=str))
        if (folder / ABOUT).exists():
            was = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            differing = [
                f"{k}: {was.get(k)!r}, not {about.get(k)!r}" for k in {*was, *about} if was.get(k) != about.get(k)
            ]
            if differing:
                raise ValueError(
                    f"{folder} was recorded otherwise ({'; '.join(sorted(differing))}): name another folder"
                )
        else:
            (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def record(
        self,
        model: torch.nn.Module,
        prompts,
        arrange: Arrange,
        judges: Mapping[str, Judge],
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda i: None,
    ) -> None:
        """Write the files that are not there yet.

        Args:
            model: has retaining heads attached, which show what heads are fed with.
            prompts: a sequence of `Prompt`.
            arrange: makes texts of them.
            judges: of the targets, by name.
            share: the number of this process, and how many share the work.
            advance: called with the number of each prompt before it is read.
        """
        rank, world = share
        for i in range(rank, self.n, world):
            advance(i)
            path = self._path(i)
            if path.exists():
                continue
            said, features = judge(model, arrange([prompts[i]]).to(model.device), dict(judges))
            tensors = {f"features.{j}": x[0].cpu().contiguous() for j, x in features.items() if x is not None}
            for name, target in said.items():
                tensors |= {
                    f"{name}.{j}": x[0].cpu().contiguous() for j, x in target.items() if features[j] is not None
                }
            # a run that is stopped leaves no half of a file
            unfinished = path.with_suffix(f".{rank}.part")
            save_file(tensors, unfinished)
            unfinished.replace(path)

    def __len__(self) -> int:
        return self.n_items

    def __getitem__(self, i: int) -> dict[str, dict[int, torch.Tensor]]:
        """`features` by layer `[T, F]`, and each target by layer, float32 `[Hkv, T]`."""
        turn, at = divmod(i, self.n)
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed + turn))
        tensors = load_file(self._path(int(order[at])))
        return {name: _by_layer(tensors, name) for name in ("features", *self.targets)}

    def _path(self, i: int) -> Path:
        return self.folder / f"{i:06}.safetensors"


def _by_layer(tensors: dict[str, torch.Tensor], name: str) -> dict[int, torch.Tensor]:
    found = {key.rpartition("."): t for key, t in tensors.items()}
    return {int(layer): t for (head, _, layer), t in found.items() if head == name}


def joined(items: list[dict], target: str) -> dict[str, dict[int, torch.Tensor]]:
    """A batch of recorded prompts, one behind the other as if they were one.

    Returns:
        `features` by layer `[1, sum of T, F]`, and `target`, float32 `[1, Hkv, sum of T]`: -inf at the first token of
        every prompt but the first, which is no neighbour of the one before it.
    """
    layers = items[0]["features"]
    features = {i: torch.cat([item["features"][i] for item in items])[None] for i in layers}
    starts = torch.tensor([len(next(iter(item["features"].values()))) for item in items[:-1]]).cumsum(0).long()
    found = {}
    for i in layers:
        found[i] = torch.cat([item[target][i] for item in items], -1)[None]
        found[i][..., starts] = -torch.inf
    return {"features": features, "target": found}
