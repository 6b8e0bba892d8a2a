"""k-NN and linear probe against scikit-learn, on features of a network that saw real digits."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import pvt  # noqa: F401 - registers its models with timm
from pipeline.errors import InputError
from pipeline.tasks import probe
from pipeline.tasks.probe import features, knn, linear_probe, logistic_regression

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return timm.create_model("pvt_pico", img_size=32, num_classes=10).eval()


@pytest.fixture(scope="module")
def digits(network: Any) -> Data:
    """Features and classes, for training and testing, of a network with random weights."""
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 16
    x = features(network, F.interpolate(images, size=32, mode="bilinear") * 2 - 1)
    y = torch.from_numpy(digits.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_features_are_the_inputs_of_the_head(network: Any, digits: Data) -> None:
    images = torch.randn(3, 3, 32, 32)
    found = features(network, images)
    assert found.shape == (3, 128)
    assert not found.requires_grad
    torch.testing.assert_close(network.head(found), network(images))


@pytest.mark.parametrize("chunk", [2**26, 1200 * 7])
def test_knn_matches_scikit_learn(digits: Data, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CHUNK", chunk)
    train_x, train_y, x, y = digits

    def weights(distances: Any) -> Any:
        return np.exp((1 - distances) / 0.07)

    theirs = KNeighborsClassifier(n_neighbors=20, metric="cosine", algorithm="brute", weights=weights)  # pyright: ignore
    expected: Any = theirs.fit(train_x.double().numpy(), train_y.numpy()).predict_proba(x.double().numpy())
    scores = knn(train_x.double(), train_y, x.double(), 10)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-9)
    assert (scores.argmax(dim=1) == y).float().mean() > 0.7
    rough = knn(train_x, train_y, x, 10)
    assert rough.dtype == torch.float32
    assert (rough.argmax(dim=1) == scores.argmax(dim=1)).float().mean() > 0.99


def test_knn_respects_k_and_temperature(digits: Data) -> None:
    train_x, train_y, x, _ = digits
    nearest = (F.normalize(x, dim=1) @ F.normalize(train_x, dim=1).T).argmax(dim=1)
    assert torch.equal(knn(train_x, train_y, x, 10, k=1).argmax(dim=1), train_y[nearest])
    flat = knn(train_x, train_y, x, 10, k=4, temperature=1e6) * 4
    torch.testing.assert_close(flat, flat.round(), rtol=0, atol=1e-3)


def test_knn_rejects_k_above_the_number_of_training_images(digits: Data) -> None:
    train_x, train_y, x, _ = digits
    with pytest.raises(InputError, match=r"k 20 needs as many training images, and there are 5: lower k"):
        knn(train_x[:5], train_y[:5], x, 10)


@pytest.mark.parametrize(("l2", "atol"), [(1.0, 1e-2), (30.0, 1e-3)])
def test_linear_probe_matches_scikit_learn_logistic_regression(digits: Data, l2: float, atol: float) -> None:
    train_x, train_y, x, y = (tensor.numpy() for tensor in digits)
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    scaled: Any = scaler.transform(train_x.astype(np.float64))
    theirs = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20000).fit(scaled, train_y)
    weight, bias = logistic_regression(torch.from_numpy(scaled), digits[1], 10, l2)
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=1e-3)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, atol=1e-3)
    scores = linear_probe(*digits[:3], 10, l2=l2)
    log_probabilities: Any = theirs.predict_log_proba(scaler.transform(x.astype(np.float64)))
    np.testing.assert_allclose(scores.log_softmax(dim=1).numpy(), log_probabilities, atol=atol)
    assert (scores.argmax(dim=1).numpy() == log_probabilities.argmax(axis=1)).all()
    assert (scores.argmax(dim=1).numpy() == y).mean() > 0.85


def test_linear_probe_result_does_not_depend_on_chunk_size(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linear_probe(*digits[:3], 10, l2=30.0)
    monkeypatch.setattr(probe, "_CHUNK", 10 * 500)
    torch.testing.assert_close(linear_probe(*digits[:3], 10, l2=30.0), whole, rtol=1e-4, atol=1e-4)


def test_linear_probe_ignores_constant_features(digits: Data) -> None:
    train_x, train_y, x, _ = (tensor.clone() for tensor in digits)
    expected = linear_probe(train_x, train_y, x, 10, l2=30.0)
    dead = torch.full((1200, 1), 3.0), torch.full((len(x), 1), 3.0)
    widened = linear_probe(torch.cat([train_x, dead[0]], 1), train_y, torch.cat([x, dead[1]], 1), 10, l2=30.0)
    torch.testing.assert_close(widened, expected, rtol=1e-4, atol=1e-4)


def test_class_without_training_images_is_never_predicted(digits: Data) -> None:
    train_x, train_y, x, _ = digits
    for scores in (knn(train_x, train_y, x, 11), linear_probe(train_x, train_y, x, 11, l2=30.0)):
        assert scores.shape == (len(x), 11)
        assert (scores.argmax(dim=1) != 10).all()


def test_linear_probe_warns_when_not_converged(
    digits: Data, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear_probe(*digits[:3], 10, l2=30.0)
    assert not caplog.text
    monkeypatch.setattr(probe, "_MAX_ITERATIONS", 5)
    linear_probe(*digits[:3], 10, l2=30.0)
    assert "has not converged" in caplog.text
