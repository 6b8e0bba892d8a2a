"""timm's models for an image size."""

from typing import Any

import timm


def create_model(name: str, image_size: int, **kwargs: Any) -> Any:
    """timm.create_model; `image_size` (pixels) goes to models that are built for one, as those with position embeddings
    are. Convolutional networks take any."""
    try:
        return timm.create_model(name, img_size=image_size, **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **kwargs)
