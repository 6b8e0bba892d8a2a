"""The code of a registered model: MLflow copies this file beside the weights and runs it to serve them."""

import io
from pathlib import Path
from typing import Any

import pandas
import safetensors.torch
import timm
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image
from timm.data.transforms_factory import create_transform

import pvt  # noqa: F401 - registers its models with timm
from pipeline.track.card import CARD, WEIGHTS, Card


class Classifier(PythonModel):
    """Encoded images in, the best label and its probability out."""

    def load_context(self, context: PythonModelContext) -> None:
        card = Card.read(Path(context.artifacts[CARD]).parent)
        size = card.image.size
        self._classes = card.classes
        self._model = timm.create_model(card.model.name, num_classes=len(card.classes), img_size=size).eval()
        self._model.load_state_dict(safetensors.torch.load_file(context.artifacts[WEIGHTS]))
        self._transform: Any = create_transform(
            (3, size, size),
            interpolation=card.image.interpolation,
            mean=card.image.mean,
            std=card.image.std,
            crop_pct=card.image.crop_pct,
        )

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class is annotated to return None
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in model_input["image"]]
        with torch.inference_mode():
            logits = self._model(torch.stack([self._transform(image) for image in images]))
        scores, labels = logits.softmax(dim=1).max(dim=1)
        return pandas.DataFrame({"label": [self._classes[label] for label in labels.tolist()], "score": scores})


set_model(Classifier())
