"""benchmarks.step: what is measured against computes the same."""

import argparse
import json
import re
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
import transformers
from matplotlib.figure import Figure

from benchmarks import report, step
from benchmarks.plain_pvt import PlainPvt
from tests.ranks import PATIENCE_S, start

PUBLIC_NAMES = {
    r"patches\.(\d)\.": r"patch_embed{}.proj.",
    r"norms\.(\d)\.": r"patch_embed{}.norm.",
    r"positions\.(\d)": r"pos_embed{}",
    r"stages\.(\d)\.": r"block{}.",
}


def public_name(name: str) -> str:
    for pattern, public in PUBLIC_NAMES.items():
        name = re.sub(f"^{pattern}", lambda found, public=public: public.format(int(found[1]) + 1), name)
    return name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")


def test_plain_pvt_matches_ours() -> None:
    torch.manual_seed(0)
    plain = PlainPvt(step.DEPTHS["pvt_tiny"], num_classes=10).eval()
    ours = timm.create_model("pvt_tiny", num_classes=10).eval()
    ours.load_state_dict({public_name(name): tensor for name, tensor in plain.state_dict().items()})
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", step.DEPTHS)
def test_all_contenders_have_the_same_parameter_count(model: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model(model)
        plain = PlainPvt(step.DEPTHS[model], step.NUM_CLASSES)
        theirs = transformers.PvtForImageClassification(
            transformers.PvtConfig(depths=list(step.DEPTHS[model]), num_labels=step.NUM_CLASSES)
        )
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, plain, theirs)]
    assert sizes[0] == sizes[1] == sizes[2]


SMALL = ("--batch", "1", "--precision", "fp32", "--rounds", "1", "--turn", "0.01")


def test_step_benchmark_prints_one_json_line_per_model(tmp_path: Path) -> None:
    log = tmp_path / "step"
    (process,) = start(1, "benchmarks.step", ["pvt_tiny", *SMALL, "--out", tmp_path], [log])
    assert process.wait(PATIENCE_S) == 0, log.with_suffix(".err").read_text()
    (line,) = log.with_suffix(".out").read_text().splitlines()
    result = json.loads(line)
    assert result["model"] == "pvt_tiny"
    fastest = max(result["contenders"][name]["images_per_second"] for name in step.PEERS)
    assert result["ratio_best_peer"] == pytest.approx(result["images_per_second"] / fastest, rel=1e-2)
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    kept = json.loads((tmp_path / "step.json").read_text())
    assert kept["models"] == [{key: result[key] for key in kept["models"][0]}]
    assert all(kept[key] == result[key] for key in ("date", "device", "cores", "versions"))
    with PIL.Image.open(tmp_path / "step.png") as picture:
        picture.load()


def test_bar_shows_the_median_of_its_readings() -> None:
    figure = Figure()
    report.bars({"a panel": {"ours": [1.0, 9.0, 2.0], "theirs": [4.0]}, "another": {"ours": [3.0]}}, "s", "title")(
        figure
    )
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [2.0, 4.0]  # pyright: ignore[reportAttributeAccessIssue]
    assert [text.get_text() for text in first.texts] == ["2", "4"]
    assert [bar.get_width() for bar in second.patches] == [3.0]  # pyright: ignore[reportAttributeAccessIssue]


def test_unused_panels_are_hidden() -> None:
    figure = Figure()
    report.bars({str(number): {"ours": [1.0]} for number in range(5)}, "s", "title")(figure)
    assert [panel.get_visible() for panel in figure.axes] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_invalid_round_count_is_rejected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a whole number of at least 1"):
        report.count(text)
