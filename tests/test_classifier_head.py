"""A classifier's head against torch.nn.Sequential with the same weights, out of every kind of file."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage
from stages.base import LoadContext
from stages.columns.classifier_head import ClassifierHead, read_layers
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import vector_pool


class Predictor(torch.nn.Module):
    """As LAION's aesthetic predictor names its layers: layers.0, 2, 4, 6, 7 are linear, the others drop out."""

    def __init__(self, width: int = 12):
        super().__init__()
        widths = [width, 32, 16, 8, 4, 1]
        linear = [torch.nn.Linear(one, two) for one, two in itertools.pairwise(widths)]
        dropout = [torch.nn.Dropout(0.2), torch.nn.Dropout(0.2), torch.nn.Dropout(0.1)]
        self.layers = torch.nn.Sequential(
            linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], linear[3], linear[4]
        )

    def forward(self, x):
        return self.layers(x)


class Standardised(torch.nn.Module):
    """As LAION's NSFW heads for L/14: standardised values, ReLU between attributes with numbers, a sigmoid."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.norm = torch.nn.Module()
        self.norm.register_buffer("mean", torch.randn(width) / 10)
        self.norm.register_buffer("variance", torch.rand(width) + 0.01)
        self.linear_1 = torch.nn.Linear(width, 7)
        self.linear_2 = torch.nn.Linear(7, 5)
        self.linear_3 = torch.nn.Linear(5, 1)

    def forward(self, x):
        x = (x - self.norm.mean) / (self.norm.variance.sqrt() + 1e-10)
        return self.linear_3(torch.relu(self.linear_2(torch.relu(self.linear_1(x)))))


def detector(width: int = 12) -> torch.nn.Sequential:
    """As LAION's NSFW head for H/14: ReLU after all linear layers but the last two."""
    widths = [width, 24, 24, 12, 10, 6, 5, 1]  # names up to 16: they are not in the order of text
    layers: list[torch.nn.Module] = []
    for one, two in itertools.pairwise(widths):
        layers += [torch.nn.Linear(one, two), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    return torch.nn.Sequential(*layers[:-5], layers[-3])


@pytest.fixture
def vectors():
    found = list(np.random.default_rng(0).normal(size=(40, 12)).astype(np.float16))
    found[5] = None  # a failed row
    found[6] = np.zeros(12, np.float16)
    found[7] = np.full(12, np.nan, np.float16)
    return found


def scores(folder, vectors, stage, shards=3):
    """head_score of each row."""
    path, columns = vector_pool(folder, vectors, [f"{number:032x}" for number in range(len(vectors))], shards)
    _, rows, _ = run_stage(path, folder / "out", stage, columns)
    return [row["head_score"] for row in rows]


def save(state, folder, kind):
    """The path of a file with the weights."""
    path = str(folder / f"head.{kind}")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "build", "activation", "output"),
    [
        ("pth", Predictor, "none", "linear"),
        ("safetensors", Predictor, "none", "sigmoid"),
        ("pth", detector, "relu_in_gaps", "linear"),
        ("npz", detector, "relu_in_gaps", "sigmoid"),
        ("pth", Standardised, "relu", "sigmoid"),
        ("pt", lambda: torch.nn.Linear(12, 1), "none", "linear"),
    ],
)
def test_scores_are_those_of_torch(kind, build, activation, output, vectors, tmp_path):
    torch.manual_seed(0)
    head = build().eval()
    path = save(head.state_dict(), tmp_path, kind)
    found = scores(tmp_path, vectors, ClassifierHead(path, "vector", activation, output))
    assert {at for at, score in enumerate(found) if score is None} == {5, 6, 7}
    known = [at for at in range(40) if at not in (5, 6, 7)]
    with torch.inference_mode():
        rows = torch.from_numpy(np.stack([vectors[at] for at in known])).float()
        expected = head(torch.nn.functional.normalize(rows, dim=1))[:, 0]
        expected = torch.sigmoid(expected) if output == "sigmoid" else expected
    assert [found[at] for at in known] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(found)) > 20


def test_the_activation_counts_and_a_checkpoint_will_do(vectors, tmp_path):
    torch.manual_seed(1)
    head = Predictor()
    path = save({"state_dict": head.state_dict(), "epoch": 3}, tmp_path, "pth")
    linear = scores(tmp_path / "a", vectors, ClassifierHead(path, "vector"))
    relu = scores(tmp_path / "b", vectors, ClassifierHead(path, "vector", "relu"), shards=1)
    assert linear != relu
    again = scores(tmp_path / "c", vectors, ClassifierHead(path, "vector", "relu"), shards=7)
    assert relu == again


def test_large_logits_do_not_overflow(tmp_path):
    path = save({"weight": torch.full((1, 2), 1e6), "bias": torch.zeros(1)}, tmp_path, "pt")
    found = scores(tmp_path, [np.ones(2), -np.ones(2)], ClassifierHead(path, "vector", output="sigmoid"))
    assert found == [1.0, 0.0]


def test_layers_come_in_the_order_of_their_numbers_and_may_lack_a_bias(tmp_path):
    state = {
        "model.10.weight": torch.ones(1, 3),
        "model.2.weight": torch.ones(3, 4),
        "model.2.bias": torch.ones(3),
    }
    layers = read_layers(save(state, tmp_path, "pth"))
    assert [(layer.weight.shape, layer.bias.tolist()) for layer in layers] == [((3, 4), [1, 1, 1]), ((1, 3), [0])]
    names = {"a.0": (3, 4), "a.1": (3, 3), "a.3": (1, 3)}
    layers = read_layers(save({f"{name}.weight": torch.ones(shape) for name, shape in names.items()}, tmp_path, "pt"))
    assert [layer.after_gap for layer in layers] == [True, False, True]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": (3, 4), "1.weight": (1, 2)}, "head.pth: layer 1 takes 2 values, expected the 3 that the one"),
        ({"0.weight": (3, 4)}, "head.pth: the last layer gives 3 values, expected one"),
        ({"0.weight": (3, 4), "0.bias": (2,)}, "layer 0 has a weight of 3 outputs and a bias of 2, expected as many"),
        ({"0.bias": (2,)}, "layer 0 has a bias alone, expected a weight"),
        ({"0.weight": (3, 4), "1.running_mean": (3,)}, r"1.running_mean of shape \[3\], expected weights \[out, in\]"),
        ({"0.weight": (3,)}, r"0.weight of shape \[3\], expected weights"),
        ({"a.0.weight": (3, 4), "b.0.weight": (1, 3)}, "layers a.0 and b.0, expected different numbers"),
        (
            {"0.weight": (1, 4), "norm.mean": (3,), "norm.variance": (4,)},
            r"norm.mean of shape \[3\], .* expected 4 num",
        ),
        ({"norm.mean": (3,), "norm.variance": (3,)}, "the last layer gives 0 values"),
        ({"0.weight": (0, 4)}, r"0.weight of shape \[0, 4\], expected weights"),
    ],
)
def test_what_is_no_head_is_one_line(state, message, tmp_path):
    path = save({name: torch.ones(shape) for name, shape in state.items()}, tmp_path, "pth")
    with pytest.raises(WinnowError, match=message):
        read_layers(path)


def test_numbers_and_widths_are_checked(vectors, tmp_path):
    path = save({"weight": torch.full((1, 12), torch.nan)}, tmp_path, "pth")
    with pytest.raises(WinnowError, match="weight has NaN or infinite numbers, expected finite ones"):
        read_layers(path)
    path = save({"weight": torch.ones(1, 768)}, tmp_path, "safetensors")
    with pytest.raises(WinnowError, match=r"column vector: vectors of 12 values, expected the 768 that .*head.safete"):
        scores(tmp_path, vectors, ClassifierHead(path, "vector"))
    with pytest.raises(ConfigError, match=r"embedding = clip_image of type string, expected float16\[\]"):
        ClassifierHead(path).check_needs({"clip_image": "string"}, {})
    with pytest.raises(ConfigError, match="stages.0.path is missing, expected a value"):
        build_stage("classifier_head", {}, "stages.0")


def test_a_missing_file_makes_it_unavailable(tmp_path):
    stage = build_stage("classifier_head", {"path": str(tmp_path / "none.pth")}, "stages.0")
    assert "is not there: for aesthetics, sac+logos+ava1-l14-linearMSE.pth" in stage.unavailable()
    assert stage.external_files() == {"path": stage.path}
    there = ClassifierHead(save({"weight": torch.ones(1, 2)}, tmp_path, "pth"))
    assert there.unavailable() == ""
    assert len(there.load(LoadContext())) == 1
