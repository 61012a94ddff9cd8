import pytest
import torch
from cases import ARCHITECTURES, new_model, prompt

from hf_kvcache.adapters import RetainingHeads, attach
from hf_kvcache.calibration.judging import TARGETS, judge
from hf_kvcache.calibration.prompts import Arrange, Prompt
from hf_kvcache.calibration.recorded import Recorded, joined

JUDGES = {name: TARGETS[name] for name in ("answer_max", "answer_weight")}


@pytest.fixture(scope="module")
def model():
    model = new_model(ARCHITECTURES["llama"](), "sdpa")
    attach(model, RetainingHeads.new(model, d_r=8))
    return model


@pytest.fixture(scope="module")
def prompts():
    ids = prompt(3, 60)
    return [Prompt(row[: 30 + i], row[:0], row[40 + i :]) for i, row in enumerate(ids)]


def recorded(folder, n=3, n_items=9, **about):
    return Recorded(folder, n, n_items, {"text": "a"} | about, ["answer_weight"])


def test_what_is_read_is_what_the_model_said(model, prompts, tmp_path):
    data = recorded(tmp_path)
    data.record(model, prompts, Arrange("answer"), JUDGES)
    assert len(data) == 9
    lengths = [len(data[i]["features"][0]) for i in range(9)]
    assert all(sorted(lengths[i : i + 3]) == [30, 31, 32] for i in (0, 3, 6)), "every prompt once in every turn"
    assert len({tuple(lengths[i : i + 3]) for i in (0, 3, 6)}) > 1, "in another order"
    for i in range(3):
        item = data[i]
        said, features = judge(model, Arrange("answer")([prompts[lengths[i] - 30]]), JUDGES)
        for layer in (0, 1):
            assert torch.equal(item["features"][layer], features[layer][0])
            assert torch.equal(item["answer_weight"][layer], said["answer_weight"][layer][0])


def test_what_is_there_is_not_read_again(model, prompts, tmp_path):
    recorded(tmp_path, n=2).record(model, prompts, Arrange("answer"), JUDGES)
    asked = []

    class Counting(list):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    more = recorded(tmp_path)
    more.record(model, Counting(prompts), Arrange("answer"), JUDGES)
    assert asked == [2]
    more.record(model, Counting(prompts), Arrange("answer"), JUDGES, share=(1, 2))
    assert asked == [2] and not list(tmp_path.glob("*.part"))


def test_other_recordings_are_refused(tmp_path):
    recorded(tmp_path)
    with pytest.raises(ValueError, match="text: 'a', not 'b'"):
        recorded(tmp_path, text="b")


def test_batches_do_not_join_neighbours(model, prompts, tmp_path):
    data = recorded(tmp_path)
    data.record(model, prompts, Arrange("answer"), JUDGES)
    items = [data[0], data[1]]
    batch, n = joined(items, "answer_weight"), len(items[0]["features"][0])
    assert batch["features"][1].shape[:2] == (1, n + len(items[1]["features"][1]))
    target = batch["target"][1][0]
    assert (target[:, n] == -torch.inf).all() and target[:, 1:n].isfinite().all()
    assert torch.equal(target[:, n + 1 :], items[1]["answer_weight"][1][:, 1:])
    assert joined(items[:1], "answer_weight")["target"][0].isfinite().all()
