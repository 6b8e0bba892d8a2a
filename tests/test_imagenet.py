"""ImageNet as it is distributed: small archives of the same make give what their unpacked trees give, or a refusal."""

import gzip
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.errors import InputError
from pipeline.shards import imagenet
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from tests.damage import Member, tar_of

WNIDS = ["n01440764", "n02119789", "n03000134", "n15075141"]
# The devkit's order is another than that of the names.
IDS = {"n02119789": 1, "n03000134": 2, "n01440764": 3, "n15075141": 4}
NUM_TRAIN, NUM_VAL = 5, 12


def encode(number: int, format: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def train_image(label: int, number: int) -> bytes:
    """One is a PNG called .JPEG, as n02105855_2933 is, and some are in CMYK."""
    if number == 3:
        return encode(100 * label + number, "PNG")
    return encode(100 * label + number, mode="CMYK" if number == 4 else "RGB")


def write_devkit(path: Path, wnid_of: dict[int, str], truth: list[int]) -> None:
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    # A class with sub-classes, as the devkit has 860 of, comes behind the others.
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in wnid_of.items()]
    rows.append((len(rows) + 1, "n00001740", "entity", "gloss", 2))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, fields).reshape(-1, 1)})
    members = [
        Member(f"ILSVRC2012_devkit_t12/data/{imagenet.META}", meta.getvalue()),
        Member(
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, truth)).encode()
        ),
    ]
    path.write_bytes(gzip.compress(tar_of(members)))


def val_label(number: int) -> int:
    return number * 7 % 4


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official files, of four classes."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    inner = []
    # In another order than that of the names, as tar has them.
    for label in (2, 0, 3, 1):
        images = [
            Member(f"{WNIDS[label]}_{number}.JPEG", train_image(label, number)) for number in reversed(range(NUM_TRAIN))
        ]
        inner.append(Member(f"{WNIDS[label]}.tar", tar_of(images)))
    (folder / imagenet.TRAIN_TAR).write_bytes(tar_of(inner))
    val = [Member(f"ILSVRC2012_val_{number:08d}.JPEG", encode(1000 + number)) for number in range(NUM_VAL, 0, -1)]
    (folder / imagenet.VAL_TAR).write_bytes(tar_of(val))
    truth = [IDS[WNIDS[val_label(number)]] for number in range(1, NUM_VAL + 1)]
    write_devkit(folder / imagenet.DEVKIT, {number: wnid for wnid, number in IDS.items()}, truth)
    monkeypatch.setattr(imagenet, "NUM_CLASSES", 4)
    monkeypatch.setattr(imagenet, "NUM_IMAGES", {"train": 4 * NUM_TRAIN, "val": NUM_VAL})
    return folder


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    """The class folders that everybody makes of them, which torchvision's ImageFolder reads."""
    for label, wnid in enumerate(WNIDS):
        (tmp_path / "tree/train" / wnid).mkdir(parents=True)
        (tmp_path / "tree/val" / wnid).mkdir(parents=True)
        for number in range(NUM_TRAIN):
            (tmp_path / f"tree/train/{wnid}/{wnid}_{number}.JPEG").write_bytes(train_image(label, number))
    for number in range(1, NUM_VAL + 1):
        path = tmp_path / f"tree/val/{WNIDS[val_label(number)]}/ILSVRC2012_val_{number:08d}.JPEG"
        path.write_bytes(encode(1000 + number))
    return tmp_path / "tree"


def contents(root: Path) -> dict[str, tuple[int, str, bytes]]:
    """Label, class and image of every sample, by the name of its file."""
    shards = ShardSet(root)
    shards.check()
    return {
        shards.key(number, row).rpartition("/")[2]: (
            record["label"],
            shards.classes[record["label"]],
            shards.read(number, row),
        )
        for number in range(len(shards.shard_samples))
        for row, record in enumerate(shards.index(number))
    }


def test_official_archives_are_packed_as_their_trees(archives: Path, trees: Path, tmp_path: Path) -> None:
    listings = imagenet.find(archives, None, 1)
    pack(listings, tmp_path / "out", samples_per_shard=6)
    for split in ("train", "val"):
        manifest = pack(trees / split, tmp_path / f"from-tree-{split}")
        assert manifest.classes == WNIDS
        assert contents(tmp_path / "out" / split) == contents(tmp_path / f"from-tree-{split}")


def write_kaggle(archives: Path, trees: Path) -> None:
    """Kaggle's layout in place of the archives."""
    data = archives / imagenet.KAGGLE
    shutil.copytree(trees / "train", data / "train")
    (data / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for path in sorted((trees / "val").rglob("*.JPEG")):
        shutil.copy(path, data / "val")
        rows.append(f"{path.stem},{path.parent.name} 85 1 499 272 {path.parent.name} 1 2 3 4 ")
    (archives / imagenet.SOLUTION).write_text("\n".join(rows))
    for name in (imagenet.TRAIN_TAR, imagenet.VAL_TAR, imagenet.DEVKIT):
        (archives / name).unlink()


def test_kaggle_layout_is_packed_as_its_trees(archives: Path, trees: Path, tmp_path: Path) -> None:
    write_kaggle(archives, trees)
    pack(imagenet.find(archives, None, 1), tmp_path / "out")
    for split in ("train", "val"):
        pack(trees / split, tmp_path / f"from-tree-{split}")
        assert contents(tmp_path / "out" / split) == contents(tmp_path / f"from-tree-{split}")
    (archives / imagenet.SOLUTION).write_text("ImageId\nx")
    with pytest.raises(InputError, match=r"LOC_val_solution.csv: cannot be read as the classes"):
        imagenet.find(archives, None, 1)


def test_one_split_alone_is_packed_and_reported(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archives / imagenet.TRAIN_TAR).unlink()
    pack(imagenet.find(archives, None, 1), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"val"}
    assert ShardSet(tmp_path / "out/val").classes == WNIDS
    assert "has nothing of train, so val alone is packed" in capsys.readouterr().err


def cut_train(folder: Path) -> None:
    path = folder / imagenet.TRAIN_TAR
    path.write_bytes(path.read_bytes()[:-12_000])


def cut_inner_tar(folder: Path) -> None:
    images = [Member(f"{WNIDS[0]}_{number}.JPEG", encode(number)) for number in range(NUM_TRAIN)]
    tars = [Member(f"{wnid}.tar", tar_of(images)) for wnid in WNIDS[1:]]
    tars.append(Member(f"{WNIDS[0]}.tar", tar_of(images)[:4000]))
    (folder / imagenet.TRAIN_TAR).write_bytes(tar_of(tars))


def other_year(folder: Path) -> None:
    images = [Member(f"{WNIDS[0]}_{number}.JPEG", encode(number)) for number in range(NUM_TRAIN)]
    (folder / imagenet.TRAIN_TAR).write_bytes(tar_of([Member(f"{WNIDS[0]}.tar", tar_of(images))]))


def flat_train(folder: Path) -> None:
    shutil.copy(folder / imagenet.VAL_TAR, folder / imagenet.TRAIN_TAR)


def no_devkit(folder: Path) -> None:
    (folder / imagenet.DEVKIT).unlink()


def devkit_of_another_task(folder: Path) -> None:
    write_devkit(folder / imagenet.DEVKIT, {1: "n02085620"}, [1] * NUM_VAL)


def short_truth(folder: Path) -> None:
    write_devkit(folder / imagenet.DEVKIT, {number: wnid for wnid, number in IDS.items()}, [1, 2])


def positions_as_truth(folder: Path) -> None:
    """Somebody's own list, which counts from 0."""
    write_devkit(folder / imagenet.DEVKIT, {number: wnid for wnid, number in IDS.items()}, [0] * NUM_VAL)


def no_devkit_at_all(folder: Path) -> None:
    (folder / imagenet.DEVKIT).write_bytes(b"<html>sign in</html>")


def damaged_meta(folder: Path) -> None:
    members = [
        Member(f"data/{imagenet.META}", b"MATLAB 5.0" + bytes(300)),
        Member(f"data/{imagenet.TRUTH}"),
    ]
    (folder / imagenet.DEVKIT).write_bytes(gzip.compress(tar_of(members)))


def other_classes(folder: Path) -> None:
    wnid_of = {number: wnid for wnid, number in IDS.items()} | {4: "n99999999"}
    write_devkit(folder / imagenet.DEVKIT, wnid_of, [1, 2, 3, 4] * (NUM_VAL // 4))


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_train, r"img_train.tar: cut short .*fetch ILSVRC2012's again, whose MD5 is 1d675b"),
        (cut_inner_tar, r"(?s)img_train.tar: 1. images of 4 classes .*has 20 of 4 in train:.*#n01440764: cut short"),
        (other_year, r"img_train.tar: 5 images of 1 classes can be used; .* has 20 of 4 in train"),
        (flat_train, r"img_train.tar: holds 'ILSVRC2012_val_00000012.JPEG', and not a tar for each class"),
        (no_devkit, r"devkit_t12.tar.gz: no such file, and ILSVRC2012_img_val.tar has no labels without it"),
        (devkit_of_another_task, r"devkit_t12.tar.gz: meta.mat names 1 classes, and not 4"),
        (short_truth, r"devkit_t12.tar.gz: has the classes of 2 images, and not of 12"),
        (positions_as_truth, r"image 1 has the class '0', which meta.mat does not name"),
        (no_devkit_at_all, r"devkit_t12.tar.gz: cannot be read: Not a gzipped file"),
        (damaged_meta, r"devkit_t12.tar.gz: meta.mat cannot be read as a table of classes"),
        (other_classes, r"training and validation have different classes, n15075141 among them"),
        (nothing, r"downloads: no ImageNet: expected ILSVRC2012_img_train.tar, .* pack --images"),
    ],
)
def test_what_is_not_imagenet_is_rejected(archives: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(archives)
    with pytest.raises(InputError, match=message):
        imagenet.find(archives, None, 1)
