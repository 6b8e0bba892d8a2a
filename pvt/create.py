"""Creates timm's models for an image size."""

from typing import Any

import timm


def create_model(name: str, image_size: int, **kwargs: Any) -> Any:
    """Calls timm.create_model, with `image_size` (pixels) for models that are built for one size.

    Those with position embeddings are; convolutional networks take any size.
    """
    try:
        return timm.create_model(name, img_size=image_size, **kwargs)
    except TypeError as error:
        # The model has no such argument; every other mistake is the caller's.
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **kwargs)
