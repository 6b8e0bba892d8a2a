"""timm's side of benchmarks.predict: a loop like that of its inference.py, with its own data loader.

image folder ──ImageDataset, DataLoader workers, PrefetchLoader──▶ batches ──model──▶ softmax, top k ──▶ CSV

python benchmarks/predict_timm.py JSON
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import timm
import torch
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader

import pvt  # noqa: F401 - registers its models with timm


def main() -> None:
    job = json.loads(sys.argv[1])
    size = job["size"]
    model = timm.create_model(job["model"], img_size=size, num_classes=job["classes"])
    model.load_state_dict(safetensors.torch.load_file(job["weights"]))
    model.eval()
    started = time.perf_counter()
    # One of many types, by the name; this one is a folder of images.
    dataset: Any = create_dataset("", job["images"])
    loader = create_loader(
        dataset,
        (3, size, size),
        job["batch_size"],
        use_prefetcher=True,
        num_workers=job["workers"],
        interpolation="bicubic",
        crop_pct=job["crop_pct"],
        device=torch.device("cpu"),
    )
    scores, labels = [], []
    with torch.inference_mode():
        for images, _ in loader:
            best = model(images).softmax(-1).topk(5)
            scores.append(best.values)
            labels.append(best.indices)
    paths = dataset.filenames(absolute=True)
    table = pd.DataFrame(torch.cat(labels).numpy(), index=paths)
    table["score"] = torch.cat(scores)[:, 0].numpy()
    table.to_csv(Path(job["out"]))
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
