"""The code of a registered model: MLflow copies this file beside the weights, and runs it to serve them."""

from mlflow.models import set_model

from pipeline.serving import ServedModel

set_model(ServedModel())
