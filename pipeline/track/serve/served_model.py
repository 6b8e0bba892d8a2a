"""A registered model that answers requests: from the bytes of images to rows of a table.

    rows of bytes ──check──▶ headers ──view (threads)──▶ what the network is shown ──network──▶ a row for each image
                      └──────────────────┴─▶ rows that cannot be used: INVALID_PARAMETER_VALUE, the server's 400

The network sees what evaluation shows it: classifier.py and whole.py have that. What is answered, classifier.py,
segmenter.py and detector.py have. Everything is bounded before it is decoded; docs/serving.md has the limits.
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

from pipeline.config import ClassificationConfig, SemanticFpnConfig
from pipeline.errors import InputError
from pipeline.shards import images
from pipeline.shards.images import BadImageError
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard
from pipeline.track.serve.classifier import ServedClassifier
from pipeline.track.serve.detector import ServedDetector
from pipeline.track.serve.segmenter import ServedSegmenter

_TOLD = 5  # bad rows

_logger = logging.getLogger("pvt.serving")

T = TypeVar("T")


class ServedNetwork(Protocol):
    """A network that is served, by its task. Its methods may be called from several threads, `answers` from one."""

    batch_size: int
    """Images that are in memory at once for a request, and that `answers` takes at once."""
    columns: Sequence[str]
    """Of an answer."""

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for a request that is not to be answered. None of its images exceeds `max_pixels`."""
        ...

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """What an image becomes in `view`."""
        ...

    def view(self, data: bytes) -> Any:
        """Raises BadImageError."""
        ...

    def answers(self, views: Sequence[Any], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A row for each."""
        ...


class ServedModel(PythonModel):
    """Encoded images in; what the model's task says of them out. Safe to call from several threads."""

    def load_context(self, context: PythonModelContext) -> None:
        """Raises InputError for a limit in the environment that is none."""
        self._max_rows = _limit("PVT_SERVE_MAX_ROWS", 256)
        self._max_bytes = _limit("PVT_SERVE_MAX_BYTES", 64 << 20)
        self._max_pixels = _limit("PVT_SERVE_MAX_PIXELS", 1 << 25)
        card = ModelCard.read(Path(context.artifacts[CARD]).parent)
        self._model = served_network(card, Path(context.artifacts[WEIGHTS]))
        # Requests share both, so a process never uses more threads than torch was given, nor decodes more images.
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), "decode")
        self._computing = threading.Lock()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class is annotated to return None
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row for each row of the column `image`, with the columns that the model's signature names.

        Raises MlflowException: INVALID_PARAMETER_VALUE for what cannot be scored, with the numbers of its rows from 0,
        INTERNAL_ERROR for everything else.
        """
        try:
            return self._answer(list(model_input["image"]), params or {})
        except MlflowException:
            raise
        except Exception as error:  # MLflow would answer 400, with a stack trace
            _logger.exception("a request could not be answered")
            raise MlflowException("internal error, which the server's log describes") from error

    def _answer(self, rows: list[Any], params: Mapping[str, Any]) -> pandas.DataFrame:
        encoded = self._checked(rows, params)
        answers: list[dict[str, Any]] = []
        for first in range(0, len(encoded), self._model.batch_size):
            views = self._decoders.map(_attempt(self._model.view), encoded[first : first + self._model.batch_size])
            good = _unless_bad(views, first)
            with self._computing, torch.inference_mode():
                answers += self._model.answers(good, params)
        return pandas.DataFrame(answers, columns=list(self._model.columns))

    def _checked(self, rows: list[Any], params: Mapping[str, Any]) -> list[bytes]:
        """The rows' bytes, once everything has been looked at that costs nothing."""
        if len(rows) > self._max_rows:
            raise MlflowException.invalid_parameter_value(f"{len(rows)} rows; a request may have {self._max_rows}")
        encoded = _unless_bad(map(_attempt(_bytes_of), rows))
        num_bytes = sum(map(len, encoded))
        if num_bytes > self._max_bytes:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_bytes:,} bytes; those of a request may have {self._max_bytes:,}"
            )
        self._model.check(_unless_bad(map(_attempt(self._header), encoded)), params, self._max_pixels)
        return encoded

    def _header(self, data: bytes) -> images.Header:
        header = images.header(data)
        if header.height * header.width > self._max_pixels:
            raise BadImageError(f"{header.width} × {header.height} pixels, more than {self._max_pixels:,} in all")
        if math.prod(self._model.resized(header.height, header.width)) > self._max_pixels:  # a line, one pixel high
            raise BadImageError(f"{header.width} × {header.height} pixels: too narrow to be resized")
        return header


def served_network(card: ModelCard, weights: Path) -> ServedNetwork:
    """Raises InputError for weights that are not the card's network's, and RuntimeError for some that make no sense."""
    if isinstance(card.task, ClassificationConfig):
        return ServedClassifier(card, weights)
    if isinstance(card.task, SemanticFpnConfig):
        return ServedSegmenter(card, weights)
    return ServedDetector(card, weights)


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
