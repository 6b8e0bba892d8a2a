"""Class weights and the scores of imbalanced data, against scikit-learn's and torch's."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from pipeline.config import Config, GuardConfig, dump_config, fingerprint, load_config
from pipeline.errors import InputError
from pipeline.job import start_checks
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.tasks.class_weights import class_shares, class_weights, guessing_loss, weigh_classes
from pipeline.tasks.classify import ClassificationMetric, ClassificationTask
from pipeline.train.guard import Guard
from pipeline.world import World
from tests.batches import batch_of
from tests.conftest import run_ranks, write_config

Make = Callable[..., Config]
SHARES = np.array([0.7, 0.25, 0.05])
NAMES = ["cat", "dog", "water snake"]


@pytest.fixture(scope="module")
def imbalanced(digit_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed, with a tenth of the training images of 5 to 9."""
    folder = tmp_path_factory.mktemp("imbalanced")
    shutil.copytree(digit_images, folder / "images")
    for digit in range(5, 10):
        for number, path in enumerate(sorted((folder / "images/train" / str(digit)).iterdir())):
            if number % 10:
                path.unlink()
    pack(folder / "images/train", folder / "train", samples_per_shard=200)
    pack(folder / "images/val", folder / "val", samples_per_shard=200)
    return folder


def labels_of(data: Path) -> np.ndarray:
    shards = ShardSet(data)
    return np.concatenate([shards.index(shard)["label"] for shard in range(len(shards.shard_samples))])


def test_balanced_weights_match_scikit_learn(imbalanced: Path) -> None:
    labels = labels_of(imbalanced / "train")
    shares = class_shares(ShardSet(imbalanced / "train"), [1.0])
    weights = class_weights("balanced", ShardSet(imbalanced / "train").classes, shares)
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(10), y=labels))
    assert weights[labels].mean() == pytest.approx(1)


def test_mixture_counts_are_weighted(digits: Path, imbalanced: Path) -> None:
    both = ShardSet(digits / "train", imbalanced / "train")
    one, other = (np.bincount(labels_of(each / "train")) for each in (digits, imbalanced))
    expected = 0.25 * one / one.sum() + 0.75 * other / other.sum()
    np.testing.assert_allclose(class_shares(both, [1.0, 3.0]), expected)


@pytest.mark.parametrize("setting", [(2, 1, 4.0), {"dog": 1, "water snake": 4.0, "cat": 2}])
def test_given_weights_are_scaled_to_mean_1(setting: Any) -> None:
    weights = class_weights(setting, NAMES, SHARES)
    np.testing.assert_allclose(weights, np.array([2, 1, 4]) / (0.7 * 2 + 0.25 + 0.05 * 4))
    assert weights @ SHARES == pytest.approx(1)


def test_class_without_samples_has_weight_0() -> None:
    np.testing.assert_allclose(class_weights("balanced", NAMES, np.array([0.75, 0, 0.25])), [2 / 3, 0, 2])
    with pytest.raises(InputError, match="is 0 for every class that has samples: give one a weight"):
        class_weights((0, 1, 0), NAMES, np.array([0.75, 0, 0.25]))


def test_weighted_loss_matches_torch() -> None:
    model, task = torch.nn.Linear(8, 3), ClassificationTask(torch.nn.Identity(), NAMES)
    images, targets, weights = torch.randn(6, 8), torch.rand(6, 3).softmax(dim=1), torch.tensor([0.5, 1.25, 4.0])
    task.class_weights = weights
    found = task.losses(model, batch_of(images, targets))
    torch.testing.assert_close(found, functional.cross_entropy(model(images), targets, weights, reduction="none"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chance_loss_is_the_lowest_of_constant_predictions(smoothing: float) -> None:
    weights = class_weights((1, 1, 3), NAMES, SHARES)
    targets = torch.eye(3) * (1 - smoothing) + smoothing / 3
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def mean_loss() -> Any:
        optimizer.zero_grad()
        losses = functional.cross_entropy(logits.expand(3, 3), targets, torch.tensor(weights).float(), reduction="none")
        loss = losses @ torch.tensor(SHARES).float()
        loss.backward()
        return loss.detach()

    optimizer.step(mean_loss)
    assert guessing_loss(weights, SHARES, smoothing) == pytest.approx(mean_loss().item(), rel=1e-5)


def test_guard_uses_the_weighted_chance_loss(imbalanced: Path, make_config: Make) -> None:
    training, task = ShardSet(imbalanced / "train"), ClassificationTask(torch.nn.Identity(), list("0123456789"))
    weigh_classes(make_config("task.class_weights=balanced", "mix={}"), training, task, World())
    assert task.chance_loss == pytest.approx(math.log(10))
    smoothed = make_config("task.class_weights=balanced", "mix={label_smoothing: 0.1}")
    weigh_classes(smoothed, training, task, World())
    assert task.chance_loss
    assert task.chance_loss > 1.1 * math.log(10)  # rare classes weigh more in the part that is spread evenly
    guard = Guard(GuardConfig(window=8), task.chance_loss)
    for step in range(16):
        loss = 1.5 if step < 8 else task.chance_loss
        guard.account(step, loss, 1.0, applied=True)
    assert guard.must_roll_back


def test_scores_of_imbalanced_predictions_match_scikit_learn() -> None:
    torch.manual_seed(0)
    # Class 3 has no sample but predictions, class 4 has neither, and class 2 has samples that nothing finds.
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 4)
    logits = torch.randn(42, 5) + 2 * functional.one_hot(labels, 5)
    logits[:, 2], logits[:, 4], logits[0, 3] = -50, -50, 50
    metric, weights = ClassificationMetric(), torch.ones(42)
    weights[-1] = 0
    for part in (slice(0, 20), slice(20, 42)):
        metric.update(logits[part], labels[part], weights[part])
    found, truth, guesses = metric.result(World()), labels[:-1].numpy(), logits[:-1].argmax(dim=1).numpy()
    assert set(guesses) == {0, 1, 3}
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guesses))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    majority = DummyClassifier(strategy="most_frequent").fit(truth[:, None], truth)
    assert found["majority"] == majority.score(truth[:, None], truth)


def test_unset_class_weights_are_not_dumped(make_config: Make) -> None:
    config = make_config("task={name: classification, class_weights: null}")
    assert config == make_config()
    assert config.model_dump(mode="json")["task"] == {"name": "classification"}
    assert "class_weights:" not in dump_config(config)
    task = ClassificationTask(torch.nn.Identity(), list("0123456789"))
    before = dict(vars(task))
    weigh_classes(config, SimpleNamespace(), task, World())  # pyright: ignore[reportArgumentType] - nothing is read
    assert vars(task) == before


@pytest.mark.parametrize("text", ["balanced", "[1, 2.5, 0]", "{a: 1, 'no': 2, 10: 0.5}"])
def test_class_weights_round_trip_and_change_the_fingerprint(make_config: Make, tmp_path: Path, text: str) -> None:
    config = make_config(f"task.class_weights={text}")
    assert config == make_config(f"task={{name: classification, class_weights: {text}}}")
    assert config.evaluate == make_config().evaluate
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yaml") == config
    assert fingerprint(config.model_dump(mode="json")) != fingerprint(make_config().model_dump(mode="json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, -2]", r"task\.class_weights: class weights are finite numbers from 0, .*: change \[-2\]"),
        ("{a: 1, b: .nan}", r"task\.class_weights: class weights are finite numbers from 0, .*: change \[nan\]"),
        ("[1, .inf]", r"change \[inf\]"),
        ("[1, two]", r"change \['two'\]"),
        ("[0, 0.0]", "not all of them 0: change one of them"),
        ("[true, 1]", "true and false are not numbers"),
        ("even", "expected balanced, a list of a number for each class, or a mapping of classes to numbers"),
        ("[]", "expected balanced, a list"),
        ("3", "expected balanced, a list"),
    ],
)
def test_invalid_class_weights_are_rejected(make_config: Make, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_config(f"task.class_weights={text}")
    assert str(error.value).count("\n") == 1


def test_class_weights_of_another_task_are_rejected(make_config: Make) -> None:
    message = r"task\.class_weights: no such setting of this task, only of classification: remove it, or set task\.name"
    with pytest.raises(InputError, match=message):
        make_config("task={name: retinanet, class_weights: balanced}", "augment={}", "mix={}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((1, 2), r"each of the 3 classes \['cat', 'dog', 'water snake'\], found 2 numbers"),
        (
            {"cat": 1, "dog": 1, "cow": 2},
            r"found unknown classes \['cow'\] and none for \['water snake'\]; 1 leaves a class as it is",
        ),
        ({"cat": 1, "dog": 1}, r"found unknown classes \[\] and none for \['water snake'\]"),
    ],
)
def test_weights_of_unknown_classes_are_rejected(setting: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        start_checks._check_class_weights(setting, NAMES)


def test_run_with_bad_class_weights_is_rejected_before_it_starts(make_config: Make, digits: Path) -> None:
    training = ShardSet(digits / "train")
    with pytest.raises(InputError, match=r"unknown classes \['ten'\] and none for \['0', '1', '2', "):
        start_checks.check_data(make_config("task.class_weights={ten: 1}"), training, None, 1)


@pytest.mark.slow
def test_weighted_losses_and_scores_are_equal_on_every_world_size(imbalanced: Path, tmp_path: Path) -> None:
    path = write_config(imbalanced, tmp_path)
    settings = "task.class_weights=balanced,train.length=6 steps,train.eval_every=6 steps,tracking.patience_s=0.1"
    lines = []
    for ranks in (1, 2, 3):
        run_ranks(ranks, "faulty", path, "{}", f"run.name=on-{ranks},{settings},tracking.uri=http://127.0.0.1:9")
        metrics = (tmp_path / f"runs/on-{ranks}/metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(line) for line in metrics])
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    scores = [each[-1] for each in lines]
    for name in ("top1", "balanced_accuracy", "macro_f1", "majority"):
        assert scores[0][name] == scores[1][name] == scores[2][name], name
