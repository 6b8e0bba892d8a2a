"""Pyramid Vision Transformer (PVT v1) backbones for timm.

Importing this package registers `pvt_pico`, `pvt_tiny`, `pvt_small`, `pvt_medium` and `pvt_large`:

    import pvt, timm
    model = timm.create_model("pvt_large", num_classes=1000, drop_path_rate=0.3)
    backbone = timm.create_model("pvt_small", features_only=True)  # maps at strides 4, 8, 16, 32
"""

from pvt.convert import from_public, from_transformers, to_public, to_transformers
from pvt.model import PyramidVisionTransformer

__all__ = [
    "PyramidVisionTransformer",
    "from_public",
    "from_transformers",
    "to_public",
    "to_transformers",
]
