"""A registered model that answers requests: from the bytes of images to rows of a table.

    rows of bytes ──check──▶ headers ──view (threads)──▶ what the network is shown ──network──▶ a row for each image
                      └──────────────────┴─▶ rows that cannot be used: INVALID_PARAMETER_VALUE, the server's 400

The network sees what evaluation shows it, which classifier.py and whole_images.py prepare. The answers are those of
classifier.py, segmenter.py and detector.py. Sizes are checked before images are decoded: docs/serving.md has limits.
"""

import base64
import binascii
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ParamSpec

from pipeline.errors import InputError
from pipeline.shards import images
from pipeline.shards.images import BadImageError
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard
from pipeline.track.serve.classifier import ServedClassifier
from pipeline.track.serve.detector import ServedDetector, ServedMaskDetector
from pipeline.track.serve.segmenter import ServedSegmenter

_MAX_REPORTED = 5
"""Bad rows that an error names."""

_logger = logging.getLogger("pvt.serving")

T = TypeVar("T")


class ServedNetwork(Protocol):
    """A network that is served, one class for each task.

    Its methods may be called from several threads at once, except `answers`.
    """

    batch_size: int
    """Number of a request's images that are in memory at once, and that `answers` takes at once."""
    columns: Mapping[str, Any]
    """The columns of an answer, each with MLflow's type."""
    params: Sequence[ParamSpec]
    """The parameters of a request."""

    def __init__(self, card: ModelCard, weights: Path) -> None:
        """Raises InputError for weights that are not the card's network's."""
        ...

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for a request that must be refused. None of its images exceeds `max_pixels`."""
        ...

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that `view` resizes an image to."""
        ...

    def view(self, data: bytes) -> Any:
        """Decodes an image and prepares what the network is shown of it. Raises BadImageError."""
        ...

    def answers(self, views: Sequence[Any], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a row for each view."""
        ...

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        """Returns an answer in words, and a number in it that is not finite where the weights are bad."""
        ...


class ServedModel(PythonModel):
    """Takes encoded images and returns the model's predictions for them. It may be called from several threads."""

    def load_context(self, context: PythonModelContext) -> None:
        """Raises InputError for a limit in the environment that is no positive number."""
        self._max_rows = _read_limit("PVT_SERVE_MAX_ROWS", 256)
        self._max_bytes = _read_limit("PVT_SERVE_MAX_BYTES", 64 << 20)
        self._max_pixels = _read_limit("PVT_SERVE_MAX_PIXELS", 1 << 25)
        card = ModelCard.read(Path(context.artifacts[CARD]).parent)
        self._model = served_network(card, Path(context.artifacts[WEIGHTS]))
        # Requests share both, so a process never uses more threads than torch was given, nor decodes more images.
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), "decode")
        self._computing = threading.Lock()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class is annotated to return None
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Returns a row for each row of the column `image`, with the columns that the model's signature names.

        Raises MlflowException: INVALID_PARAMETER_VALUE for rows that cannot be scored, with their numbers from 0, and
        INTERNAL_ERROR for everything else.
        """
        try:
            return self._answer(list(model_input["image"]), params or {})
        except MlflowException:
            raise
        except Exception as error:
            # Without this, MLflow answers 400 with a stack trace.
            _logger.exception("a request could not be answered")
            raise MlflowException("internal error, which the server's log describes") from error

    def _answer(self, rows: list[Any], params: Mapping[str, Any]) -> pandas.DataFrame:
        encoded = self._check_request(rows, params)
        batch_size = self._model.batch_size
        answers: list[dict[str, Any]] = []
        # Decoded images are large, so only one batch of a request is in memory at a time.
        for first in range(0, len(encoded), batch_size):
            batch = encoded[first : first + batch_size]
            outcomes = self._decoders.map(_catch_bad_image(self._model.view), batch)
            views = _require_good(outcomes, first)
            # One request computes at a time: torch uses all of its threads for each.
            with self._computing, torch.inference_mode():
                answers += self._model.answers(views, params)
        return pandas.DataFrame(answers, columns=list(self._model.columns))

    def _check_request(self, rows: list[Any], params: Mapping[str, Any]) -> list[bytes]:
        """Returns the rows' bytes, after all checks that need no decoded image."""
        if len(rows) > self._max_rows:
            raise MlflowException.invalid_parameter_value(f"{len(rows)} rows; a request may have {self._max_rows}")
        # The cheapest checks come first: a request that is too large must not cost much.
        encoded = _require_good(map(_catch_bad_image(_read_bytes), rows))
        num_bytes = sum(map(len, encoded))
        if num_bytes > self._max_bytes:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_bytes:,} bytes; those of a request may have {self._max_bytes:,}"
            )
        headers = _require_good(map(_catch_bad_image(self._read_header), encoded))
        self._model.check(headers, params, self._max_pixels)
        return encoded

    def _read_header(self, data: bytes) -> images.Header:
        header = images.header(data)
        if header.height * header.width > self._max_pixels:
            raise BadImageError(f"{header.width} × {header.height} pixels, more than {self._max_pixels:,} in all")
        # A line of pixels is small itself, but becomes huge when its short side is resized.
        resized = self._model.resized(header.height, header.width)
        if math.prod(resized) > self._max_pixels:
            raise BadImageError(f"{header.width} × {header.height} pixels: too narrow to be resized")
        return header


SERVED: dict[str, type[ServedNetwork]] = {
    "classification": ServedClassifier,
    "semantic_fpn": ServedSegmenter,
    "retinanet": ServedDetector,
    "mask_rcnn": ServedMaskDetector,
    "detr": ServedDetector,
}
"""The class that serves each task's networks."""


def served_network(card: ModelCard, weights: Path) -> ServedNetwork:
    """Builds the network of the card's task.

    Raises InputError for weights that are not the card's network's, and RuntimeError for a detector's that are not
    finite.
    """
    return SERVED[card.task.name](card, weights)


def _read_bytes(value: object) -> bytes:
    """Returns an image's bytes. Raises BadImageError for a value that holds none."""
    data = value.encode() if isinstance(value, str) else value
    if not isinstance(data, bytes):
        raise BadImageError(f"the bytes of an image were expected, not {type(value).__name__}")
    # JPEG and PNG never are ASCII. MLflow decodes base64 in data frames, but passes on that of `inputs` and
    # `instances` as it is.
    if not data.isascii():
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise BadImageError("neither an image nor base64 of one") from None


def _catch_bad_image(function: Callable[[Any], T]) -> Callable[[Any], T | BadImageError]:
    """Wraps a function so that it returns a BadImageError instead of raising it: one error reports several rows."""

    def call(value: Any) -> T | BadImageError:
        try:
            return function(value)
        except BadImageError as error:
            return error

    return call


def _require_good(outcomes: Iterable[T | BadImageError], first_row: int = 0) -> list[T]:
    """Returns the outcomes of all rows. Raises MlflowException, which names the rows, if any of them are errors."""
    good: list[T] = []
    bad: list[str] = []
    for row, outcome in enumerate(outcomes, first_row):
        if isinstance(outcome, BadImageError):
            bad.append(f"row {row}: {outcome}")
        else:
            good.append(outcome)
    if bad:
        reported = "; ".join(bad[:_MAX_REPORTED])
        if len(bad) > _MAX_REPORTED:
            reported += f" (and {len(bad) - _MAX_REPORTED} more)"
        raise MlflowException.invalid_parameter_value(reported)
    return good


def _read_limit(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{variable}={text}: a whole number of at least 1 was expected")
    return int(text)
