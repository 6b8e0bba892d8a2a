"""The backgrounds of scenes: colour photographs that scikit-learn and scikit-image ship, with licences to change them.

Each is cut in two: training sees its left and validation its right. So a network learns the kinds of backgrounds, and
is evaluated on other backgrounds of these kinds.
"""

import functools
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import skimage.data
import sklearn.datasets
from PIL import Image

Split = Literal["train", "val"]
TRAIN_SHARE = 0.6
"""The share of a photograph's width that training sees."""


class Photograph(NamedTuple):
    name: str
    package: str
    author: str
    licence: str
    licence_url: str
    source: str

    def pixels(self, split: Split) -> npt.NDArray[np.uint8]:
        """Returns a split's part of the photograph, RGB, [height, width, 3]."""
        whole = _pixels(self.name, self.package)
        border = round(TRAIN_SHARE * whole.shape[1])
        if split == "train":
            return whole[:, :border]
        return whole[:, border:]


_CC_BY = "CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"
_CC0 = "CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"
_PUBLIC = "public domain", "https://creativecommons.org/publicdomain/mark/1.0/"
_HOST = "https://www.flickr.com/photos"

PHOTOGRAPHS = (
    Photograph("china", "scikit-learn", "danielbuechele", *_CC_BY, f"{_HOST}/danielbuechele/6061409035"),
    Photograph("flower", "scikit-learn", "vultilion", *_CC_BY, f"{_HOST}/vultilion/6056698931"),
    Photograph("astronaut", "scikit-image", "NASA", *_PUBLIC, "https://flic.kr/p/r9qvLn"),
    Photograph("coffee", "scikit-image", "Rachel Michetti", *_CC0, "courtesy of Pikolo Espresso Bar"),
    Photograph("chelsea", "scikit-image", "Stefan van der Walt", *_CC0, "given by the photographer"),
    Photograph("rocket", "scikit-image", "SpaceX", *_PUBLIC, f"{_HOST}/spacexphotos/16511594820"),
    Photograph("hubble_deep_field", "scikit-image", "NASA", *_PUBLIC, "HubbleSite, release 2012-37"),
    Photograph("retina", "scikit-image", "Mikael Häggström", *_CC0, "https://doi.org/10.15347/wjm/2014.008"),
)


def attribution() -> str:
    """Returns the credits that have to accompany pictures of scenes."""
    lines = [
        "Scenes of handwritten digits, composed from:",
        "",
        'Digits: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak,',
        "  UCI Machine Learning Repository, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), https://doi.org/10.24432/C50P49;",
        "  from scikit-learn; scaled, turned and coloured.",
        "",
        "Photographs (cut, mirrored and scaled; the left of each in training, the right in validation):",
    ]
    for photograph in PHOTOGRAPHS:
        lines.append(
            f"  {photograph.name}: {photograph.author}, {photograph.licence} ({photograph.licence_url}), "
            f"{photograph.source}; from {photograph.package}"
        )
    return "\n".join(lines) + "\n"


@functools.cache
def _pixels(name: str, package: str) -> npt.NDArray[np.uint8]:
    if package == "scikit-image":
        return getattr(skimage.data, name)()
    # Its own loader reads both photographs at each call.
    path = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
    return np.asarray(Image.open(path).convert("RGB"))
