"""The code of a registered model: MLflow copies this file beside the weights and runs it to serve them.

    rows of bytes ──check──▶ headers ──view (threads)──▶ [n, S, S, 3] uint8 ──network──▶ [n, K] scores ──▶ labels
                      └──────────────────┴─▶ rows that cannot be used: INVALID_PARAMETER_VALUE, the server's 400

The network sees what evaluation shows it. Everything is bounded before it is decoded; docs/serving.md has the limits.
"""

import base64
import binascii
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas
import safetensors.torch
import timm
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image
from torch import Tensor

import pvt  # noqa: F401 - registers its models with timm
from pipeline.errors import InputError
from pipeline.shards import images
from pipeline.shards.images import BadImageError
from pipeline.track.card import CARD, WEIGHTS, Card
from pipeline.track.package import TOP_K

_BATCH = 32  # images that are in memory at once for a request, and that the network takes at once
_TOLD = 5  # bad rows

_logger = logging.getLogger("pvt.serving")

T = TypeVar("T")


class Classifier(PythonModel):
    """Encoded images in; the best labels and their probabilities out. Safe to call from several threads."""

    def load_context(self, context: PythonModelContext) -> None:
        """Raises InputError for a limit in the environment that is none."""
        card = Card.read(Path(context.artifacts[CARD]).parent)
        self._classes, self._size = card.classes, card.image.size
        self._short_side = int(card.image.size / card.image.crop_pct)
        self._resampling = Image.Resampling[card.image.interpolation.upper()]
        self._mean = 255 * torch.tensor(card.image.mean)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(card.image.std)[:, None, None])
        self._network = timm.create_model(card.model.name, num_classes=len(card.classes), img_size=self._size).eval()
        self._network.load_state_dict(safetensors.torch.load_file(context.artifacts[WEIGHTS]))
        self._max_rows = _limit("PVT_SERVE_MAX_ROWS", 256)
        self._max_bytes = _limit("PVT_SERVE_MAX_BYTES", 64 << 20)
        self._max_pixels = _limit("PVT_SERVE_MAX_PIXELS", 1 << 25)
        # Requests share both, so a process never uses more threads than torch was given, nor decodes more images.
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), "decode")
        self._computing = threading.Lock()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class is annotated to return None
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row for each row of the column `image`: label and score (probability), and lists of the top_k of both.

        Raises MlflowException: INVALID_PARAMETER_VALUE for what cannot be scored, with the numbers of its rows from 0,
        INTERNAL_ERROR for everything else.
        """
        try:
            return self._answer(list(model_input["image"]), (params or {}).get("top_k", TOP_K))
        except MlflowException:
            raise
        except Exception as error:  # MLflow would answer 400, with a stack trace
            _logger.exception("a request could not be answered")
            raise MlflowException("internal error, which the server's log describes") from error

    def _answer(self, rows: list[Any], top_k: int | None) -> pandas.DataFrame:
        if top_k is None or top_k < 1:
            raise MlflowException.invalid_parameter_value(f"top_k is {top_k}; a number of at least 1 was expected")
        encoded = self._checked(rows)
        labels: list[list[str]] = []
        scores: list[list[float]] = []
        for first in range(0, len(encoded), _BATCH):
            views = self._decoders.map(_attempt(self._view), encoded[first : first + _BATCH])
            best = self._probabilities(_unless_bad(views, first)).topk(min(top_k, len(self._classes)))
            labels += [[self._classes[label] for label in row] for row in best.indices.tolist()]
            scores += best.values.tolist()
        first_of = {"label": [row[0] for row in labels], "score": [row[0] for row in scores]}
        return pandas.DataFrame({**first_of, "labels": labels, "scores": scores})

    def _checked(self, rows: list[Any]) -> list[bytes]:
        """The rows' bytes, once everything has been looked at that costs nothing."""
        if len(rows) > self._max_rows:
            raise MlflowException.invalid_parameter_value(f"{len(rows)} rows; a request may have {self._max_rows}")
        encoded = _unless_bad(map(_attempt(_bytes_of), rows))
        num_bytes = sum(map(len, encoded))
        if num_bytes > self._max_bytes:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_bytes:,} bytes; those of a request may have {self._max_bytes:,}"
            )
        _unless_bad(map(_attempt(self._check_size), encoded))
        return encoded

    def _check_size(self, data: bytes) -> None:
        header = images.header(data)
        resized = self._resized(header.height, header.width)
        if header.height * header.width > self._max_pixels:
            raise BadImageError(f"{header.width} × {header.height} pixels, more than {self._max_pixels:,} in all")
        if math.prod(resized) > self._max_pixels:  # of a line, one pixel high
            raise BadImageError(f"{header.width} × {header.height} pixels: too narrow to be resized")

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        short = min(height, width)
        return self._short_side * height // short, self._short_side * width // short

    def _view(self, data: bytes) -> npt.NDArray[np.uint8]:
        """What evaluation shows the network, [S, S, 3]: the centre of the image with its short side resized."""
        image = images.decode(data)
        height, width = self._resized(image.height, image.width)
        top, left = round((height - self._size) / 2), round((width - self._size) / 2)
        image = image.resize((width, height), self._resampling)
        return np.asarray(image.crop((left, top, left + self._size, top + self._size)))

    def _probabilities(self, views: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """[n, S, S, 3] to [n, K]."""
        with self._computing, torch.inference_mode():
            pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous().float()
            return self._network((pixels - self._mean) * self._scale).softmax(dim=1)


def _bytes_of(value: object) -> bytes:
    """MLflow decodes base64 in data frames, but hands over that in `inputs` and `instances` as it is."""
    data = value.encode() if isinstance(value, str) else value
    if not isinstance(data, bytes):
        raise BadImageError(f"the bytes of an image were expected, not {type(value).__name__}")
    if not data.isascii():  # as JPEG and PNG never are
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise BadImageError("neither an image nor base64 of one") from None


def _attempt(function: Callable[[Any], T]) -> Callable[[Any], T | BadImageError]:
    def attempt(value: Any) -> T | BadImageError:
        try:
            return function(value)
        except BadImageError as error:
            return error

    return attempt


def _unless_bad(outcomes: Iterable[T | BadImageError], first_row: int = 0) -> list[T]:
    """The outcomes of all rows; raises MlflowException if there are bad ones among them."""
    good: list[T] = []
    bad: list[str] = []
    for row, outcome in enumerate(outcomes, first_row):
        if isinstance(outcome, BadImageError):
            bad.append(f"row {row}: {outcome}")
        else:
            good.append(outcome)
    if bad:
        more = f" (and {len(bad) - _TOLD} more)" if len(bad) > _TOLD else ""
        raise MlflowException.invalid_parameter_value("; ".join(bad[:_TOLD]) + more)
    return good


def _limit(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{variable}={text}: a whole number of at least 1 was expected")
    return int(text)


set_model(Classifier())
