"""Hostile images, tars, indexes, manifests and lists, for packing, indexing, verifying, showing and feeding."""

import contextlib
import hashlib
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.index import RECORD, Manifest, Shard, read_manifest
from pipeline.shards.pack import pack
from tests import corpus, damage
from tests.chaos.hostile import mutate
from tests.chaos.hostile.mutate import Rng, pick
from tests.chaos.hostile.trial import Case, Ran, Sandbox
from tests.damage import CLASSES, Member, Sample, tar_of

PACK, INDEX, VERIFY, SHOW = (("launch/shards.py", word) for word in ("pack", "index", "verify", "show"))
FEED = "tests.chaos.hostile.feed"
_ONE = ("--workers", "1")
_NUM_GOOD = 4
_NUM_HOSTILE = 24


# Images


def _scans(rng: Rng, data: bytes) -> bytes:
    """A progressive JPEG whose last scan comes ten thousand times."""
    buffer = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").save(buffer, "JPEG", progressive=True)
    image = buffer.getvalue()
    last = image.rindex(b"\xff\xda")
    return image[:last] + image[last:-2] * 10_000 + b"\xff\xd9"


def _fill(rng: Rng, data: bytes) -> bytes:
    """A JPEG with megabytes of fill bytes before a marker."""
    return data[:2] + b"\xff" * int(rng.integers(1 << 20, 8 << 20)) + data[2:]


def _comments(rng: Rng, data: bytes) -> bytes:
    """A JPEG with thousands of empty comments."""
    return data[:2] + b"\xff\xfe\x00\x02" * 200_000 + data[2:]


def _png_with(rng: Rng, data: bytes, kind: bytes, body: bytes) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").save(buffer, "PNG")
    image = buffer.getvalue()
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return image[:33] + chunk + image[33:]


def _text_bomb(rng: Rng, data: bytes) -> bytes:
    """A PNG whose compressed text is half a gigabyte."""
    return _png_with(rng, data, b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 29), 1))


def _profile_bomb(rng: Rng, data: bytes) -> bytes:
    """A PNG whose compressed colour profile is half a gigabyte."""
    return _png_with(rng, data, b"iCCP", b"key\0\0" + zlib.compress(bytes(1 << 29), 1))


def _thin(rng: Rng, data: bytes) -> bytes:
    """An image of one row or column, as long as its format allows."""
    buffer = BytesIO()
    size = (1, 65_500) if rng.integers(2) else (65_500, 1)
    Image.new("RGB", size, (9, 99, 200)).save(buffer, pick(rng, ("JPEG", "PNG")))
    return buffer.getvalue()


def _mutated(rng: Rng, data: bytes) -> bytes:
    base = pick(rng, _BASES)(rng, data)
    return mutate.some_bytes(rng, base)


def _as(format: str, mode: str = "RGB", **options: Any) -> Callable[[Rng, bytes], bytes]:
    def encode(rng: Rng, data: bytes) -> bytes:
        buffer = BytesIO()
        Image.open(BytesIO(data)).convert(mode).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


def _of_corpus(rng: Rng, data: bytes) -> bytes:
    kinds = list(corpus.kinds())
    return pick(rng, kinds).data


_BASES: tuple[Callable[[Rng, bytes], bytes], ...] = (
    _as("JPEG"),
    _as("JPEG", progressive=True),
    _as("JPEG", "L"),
    _as("JPEG", "CMYK"),
    _as("JPEG", restart_marker_blocks=2),
    _as("PNG"),
    _as("PNG", "P"),
    _as("PNG", "RGBA"),
    _as("PNG", "1"),
    _of_corpus,
)
_RARE = (_scans, _fill, _comments, _text_bomb, _profile_bomb, _thin)


def hostile_image(rng: Rng) -> tuple[bytes, str]:
    """Returns an encoded image and what was done to it."""
    data = damage.picture(rng, int(rng.integers(2)))
    chance = int(rng.integers(40))
    if chance < 2:
        spoil = pick(rng, _RARE)
    elif chance < 8:
        spoil = pick(rng, damage.IMAGE_DAMAGE)
    else:
        spoil = _mutated
    return spoil(rng, data), spoil.__name__


def hostile_tree(rng: Rng, images: Path, num_hostile: int = _NUM_HOSTILE) -> tuple[set[str], list[str]]:
    """Writes good and hostile files as class folders. Returns the stems of the good ones and the other kinds."""
    good, kinds = set[str](), []
    for number in range(_NUM_GOOD + num_hostile):
        label = number % 2
        path = images / CLASSES[label] / f"{number:04d}.{pick(rng, ('jpg', 'png', 'JPEG'))}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < _NUM_GOOD:
            path.write_bytes(damage.picture(rng, label))
            good.add(path.stem)
        else:
            data, kind = hostile_image(rng)
            path.write_bytes(data)
            kinds.append(kind)
    return good, kinds


def own_images(rng: Rng, sandbox: Sandbox) -> Case:
    """A tree of classes that a run packs itself: whatever is wrong with a file, it is named and nothing is fed."""
    _, kinds = hostile_tree(rng, sandbox.work / "images", num_hostile=2)
    return Case(f"own images: {_commonest(kinds)}", [(FEED, "images")], inputs=2)


def packed_images(rng: Rng, sandbox: Sandbox) -> Case:
    """Hostile files among good ones in a tree of classes."""
    images = sandbox.work / "images"
    good, kinds = hostile_tree(rng, images)
    commands = [
        (*PACK, "--images", "images", "--out", "out", "--skip-bad", *_ONE),
        (*VERIFY, "out", "--deep", *_ONE),
        (FEED, "out"),
    ]

    def judge(ran: Sequence[Ran]) -> str:
        if [each.code for each in ran] != [0, 0, 0]:
            return f"exit codes {[each.code for each in ran]}: {ran[-1].error[-300:]}"
        held = _stems(sandbox.work / "out")
        if missing := good - held:
            return f"good images were skipped: {sorted(missing)}"
        skipped = {Path(str(fault["path"])).stem for fault in read_skipped(sandbox.work / "out")}
        if lost := {f"{number:04d}" for number in range(_NUM_GOOD + _NUM_HOSTILE)} - held - skipped:
            return f"neither packed nor reported: {sorted(lost)}"
        return _differing(sandbox.work / "out", images)

    return Case(f"images: {_commonest(kinds)}", commands, judge, inputs=_NUM_HOSTILE)


def _commonest(kinds: list[str]) -> str:
    rare = sorted({kind.strip("_") for kind in kinds if kind != "_mutated"})
    return "mutated" if not rare else f"mutated and {pick(np.random.default_rng(len(rare)), rare)}"


def _members(root: Path) -> dict[str, bytes]:
    """Returns the images of a packed set by their stems."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file and not member.name.endswith(".cls"):
                    found[Path(member.name).stem] = file.read()
    return found


def _stems(root: Path) -> set[str]:
    return set(_members(root))


def _differing(root: Path, images: Path) -> str:
    """Says which packed image is not the picture that Pillow reads from its source."""
    sources = {path.stem: path for path in images.rglob("*") if path.is_file()}
    for stem, data in _members(root).items():
        try:
            with Image.open(sources[stem]) as image:
                image.load()
        except Exception as error:  # whatever a decoder raises
            return f"{stem} was packed, but Pillow refuses it: {error}"
        with Image.open(BytesIO(data)) as packed:
            packed.load()
            if packed.size != image.size:
                return f"{stem} is {packed.size} in the shard and {image.size} in its file"
    return ""


def fed_images(rng: Rng, sandbox: Sandbox) -> Case:
    """Hostile images whose tars were indexed without decoding, so that the feed meets them."""
    samples = []
    for number in range(2 * _NUM_HOSTILE):
        hostile = number % 2
        data = hostile_image(rng)[0] if hostile else damage.picture(rng, number % 2)
        samples.append(Sample(f"{number:04d}", number // 2 % 2, data))
    (sandbox.work / "tars").mkdir()
    (sandbox.work / "tars/a.tar").write_bytes(damage.whole(samples))
    commands = [
        (*INDEX, "tars", "--no-decode", "--skip-bad", *_ONE),
        (*VERIFY, "tars", "--deep", *_ONE),
        (FEED, "tars", "rule"),
    ]

    def judge(ran: Sequence[Ran]) -> str:
        indexed, _, fed = ran
        if indexed.code:
            return f"index ended with {indexed.code}: {indexed.error[-300:]}"
        if fed.code:
            return f"other samples were fed than the rule says: {fed.result or fed.error[-300:]}"
        return ""

    return Case("images behind an index", commands, judge, inputs=_NUM_HOSTILE)


# Tars


def _samples(rng: Rng, number: int = 4) -> list[Sample]:
    return [Sample(f"{CLASSES[row % 2]}/{row}", row % 2, damage.picture(rng, row % 2)) for row in range(number)]


def _of_damage(rng: Rng) -> bytes:
    return pick(rng, damage.SHARD_DAMAGE)(rng, _samples(rng)).data


def _many_records(rng: Rng) -> bytes:
    """A PAX header of a hundred thousand records."""
    image, label = _samples(rng)[0].members
    image.pax = {f"SCHILY.xattr.user.{number}": "x" for number in range(100_000)}
    return tar_of([image, label])


def _long_record(rng: Rng) -> bytes:
    """PAX records of 64 MiB."""
    image, label = _samples(rng)[0].members
    image.pax = {pick(rng, ("comment", "path", "linkpath", "uname")): "x" * (64 << 20)}
    return tar_of([image, label])


def _many_globals(rng: Rng) -> bytes:
    """Thousands of global PAX headers."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        body = b"30 comment=xxxxxxxxxxxxxxxxxx\n"
        for _ in range(20_000):
            info = tarfile.TarInfo("global")
            info.type, info.size = tarfile.XGLTYPE, len(body)
            tar.addfile(info, BytesIO(body))
    return buffer.getvalue()[: -1024 * 2] + damage.whole(_samples(rng))


def _empty_members(rng: Rng) -> bytes:
    return tar_of([Member(f"{number}.txt") for number in range(30_000)])


def _pax_numbers(rng: Rng) -> bytes:
    """PAX records that overrule sizes, paths and times with what they should not hold."""
    members = [member for sample in _samples(rng) for member in sample.members]
    key = pick(rng, ("size", "path", "mtime", "uid", "GNU.sparse.map", "GNU.sparse.size", "hdrcharset"))
    pick(rng, members).pax = {key: str(pick(rng, mutate.WEIRD_VALUES))[:1000].replace("\0", "")}
    return tar_of(members)


def _mutated_tar(rng: Rng) -> bytes:
    members = [member for sample in _samples(rng) for member in sample.members]
    data = tar_of(members, pick(rng, (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    data = mutate.some_bytes(rng, data)
    return _with_checksums(data) if rng.integers(2) else data


def _with_checksums(data: bytes) -> bytes:
    """Returns the tar with the checksum of each block corrected that looks like a header."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            header = blocks[at : at + 512]
            header[148:156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(blocks)


HOSTILE_TARS = (_mutated_tar,) * 6 + (_pax_numbers,) * 3 + (_of_damage,) * 6
_RARE_TARS = (_many_records, _long_record, _many_globals, _empty_members)


def tars(rng: Rng, sandbox: Sandbox) -> Case:
    """Hostile tars beside a good one."""
    folder = sandbox.work / "tars"
    folder.mkdir()
    good = [Sample(f"good/{row}", row % 2, damage.picture(rng, row % 2)) for row in range(4)]
    (folder / "good.tar").write_bytes(damage.whole(good))
    makers = [pick(rng, _RARE_TARS if rng.integers(30) == 0 else HOSTILE_TARS) for _ in range(12)]
    for number, make in enumerate(makers):
        (folder / f"{number}.tar").write_bytes(make(rng))
    commands = [
        (*INDEX, "tars", "--out", "out", "--labels", "cls", "--skip-bad", *_ONE),
        (*VERIFY, "out", "--deep", *_ONE),
        (FEED, "out"),
    ]

    def judge(ran: Sequence[Ran]) -> str:
        if ran[0].code:
            return f"a good tar was not indexed: {ran[0].error[-300:]}"
        manifest = read_manifest(sandbox.work / "out")
        if not any(shard.name == "good" and shard.samples == 4 for shard in manifest.shards):
            return "the good tar's samples are not all there"
        if ran[1].code:
            return f"what was indexed does not verify: {ran[1].error[-300:]}"
        return ""

    rare = [make.__name__.strip("_") for make in makers if make in _RARE_TARS]
    return Case(f"tars: {rare[0] if rare else 'mutated'}", commands, judge, inputs=len(makers))


# Packed sets

_FIELDS = [field[0] for field in RECORD.descr]


def prepare(folder: Path) -> Path:
    """Packs the data set that generators damage: 24 photographs in 3 shards."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / "images" / CLASSES[number % 2] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage.picture(rng, number % 2))
    pack(folder / "images", folder / "packed", samples_per_shard=8)
    return folder / "packed"


def _lie(rng: Rng, root: Path) -> str:
    """Changes an index and the digests that cover it, so that only what it says can be wrong. Returns what it says."""
    manifest = read_manifest(root)
    number = int(rng.integers(len(manifest.shards)))
    shard = manifest.shards[number]
    path = root / shard.index.name
    records = np.load(path)
    what = pick(rng, ("field", "count", "dtype", "shape", "bytes", "empty"))
    if what == "field":
        field = pick(rng, _FIELDS)
        most = int(np.iinfo(records[field].dtype).max)
        value = pick(rng, (0, 1, -1, 2**31, most, most // 2))
        records[field][int(rng.integers(len(records)))] = np.array(value).astype(records[field].dtype)
        what = f"{field} {value}"
    elif what == "count":
        records = records[: len(records) // 2]
    elif what == "dtype":
        other = records.astype([(name, "<f8") for name in _FIELDS])
        records = pick(rng, (other, records[["label"]].copy()))
    elif what == "shape":
        records = records.reshape(2, -1)
    elif what == "empty":
        records = records[:0]
    buffer = BytesIO()
    np.save(buffer, records)
    data = buffer.getvalue()
    if what == "bytes":
        data = mutate.some_bytes(rng, data)
    path.write_bytes(data)
    fields = {name: getattr(shard, name) for name in ("name", "samples", "bytes", "sha256")}
    shards = list(manifest.shards)
    shards[number] = Shard(**fields, index_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest())
    (root / "manifest.json").write_bytes(Manifest.of(manifest.classes, shards).encode())
    return what


def packed(prepared: Path) -> Callable[[Rng, Sandbox], Case]:
    """A packed set of which one file was changed, by accident or by somebody who corrected the digests."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        root = sandbox.work / "packed"
        shutil.copytree(prepared, root)
        kind = pick(rng, ("index", "tar", "manifest", "manifest", "lie", "lie", "place"))
        if kind == "lie":
            kind = f"lie about {_lie(rng, root).split()[0]}"
        elif kind == "manifest":
            document = json.loads((root / "manifest.json").read_text())
            (root / "manifest.json").write_bytes(mutate.json_text(rng, document))
        elif kind == "place":
            kind = mutate.something_else(rng, pick(rng, sorted(root.iterdir())))
        else:
            path = pick(rng, sorted(root.glob("*.index.npy" if kind == "index" else "*.tar")))
            path.write_bytes(mutate.some_bytes(rng, path.read_bytes()))
        commands = [(*VERIFY, "packed", *_ONE), (*SHOW, "packed"), (FEED, "packed")]
        changed = _content(root) != _content(prepared)

        def judge(ran: Sequence[Ran]) -> str:
            if changed and ran[0].code == 0 and "lie" not in kind:
                return "verify found no fault in what was changed"
            return ""

        return Case(f"packed: {kind}", commands, judge)

    return make


def _content(root: Path) -> dict[str, Any]:
    """Returns what the files hold, a manifest as a tree: another order of keys is no other manifest."""
    found: dict[str, Any] = dict(mutate.content(root))
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        found["manifest.json"] = json.dumps(json.loads(found["manifest.json"]), sort_keys=True)
    return found


# Lists


def lists(rng: Rng, sandbox: Sandbox) -> Case:
    """A list of paths and labels, or annotations in COCO's form, that says what it should not."""
    images = sandbox.work / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes(damage.picture(rng, number % 2))
    kind = pick(rng, ("csv", "jsonl", "coco", "parquet"))
    if kind == "coco":
        return _coco(rng, sandbox)
    rows = [{"path": f"images/{number}.jpg", "label": CLASSES[number % 2]} for number in range(4)]
    if rng.integers(2):
        row = pick(rng, rows)
        row[pick(rng, ("path", "label"))] = pick(rng, mutate.WEIRD_TEXT)
    path = sandbox.work / f"list.{kind}"
    if kind == "jsonl":
        lines = [json.dumps(row).encode() for row in rows]
        lines[1] = mutate.json_text(rng, rows[1])
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif kind == "csv":
        text = "path,label\n" + "".join(f'"{row["path"]}","{row["label"]}"\n' for row in rows)
        path.write_bytes(mutate.some_bytes(rng, text.encode()))
    else:
        encoded = [(images / f"{number}.jpg").read_bytes() for number in range(4)]
        columns = {
            "image": [{"bytes": data, "path": row["path"]} for data, row in zip(encoded, rows, strict=True)],
            "label": [row["label"] for row in rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        path.write_bytes(mutate.some_bytes(rng, path.read_bytes()))
    return Case(f"list: {kind}", [(*PACK, "--images", path.name, "--out", "out", "--skip-bad", *_ONE)])


def _coco(rng: Rng, sandbox: Sandbox) -> Case:
    document = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 36, "width": 36} for number in range(4)],
        "categories": [{"id": 7, "name": "thing"}, {"id": 9, "name": "other"}],
        "annotations": [
            {
                "id": number,
                "image_id": number % 4,
                "category_id": 7,
                "bbox": [1, 2, 10, 12],
                "area": 120,
                "iscrowd": number % 2,
                "segmentation": {"size": [36, 36], "counts": [10, 20, 1266]} if number % 2 else [[1, 1, 9, 1, 9, 9]],
            }
            for number in range(6)
        ],
    }
    for image in document["images"]:
        with Image.open(sandbox.work / "images" / str(image["file_name"])) as opened:
            image["width"], image["height"] = opened.size
    folder = sandbox.work / "annotations"
    folder.mkdir()
    (folder / "instances_val.json").write_bytes(mutate.json_text(rng, document))
    words = ("--coco", "annotations/instances_val.json", "--images", "images", "--out", "out", "--skip-bad")
    return Case("list: coco", [(*PACK, *words, *_ONE)])
