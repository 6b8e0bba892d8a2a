"""One rank of a run trained in legs, each restored from the checkpoint of the one before; see test_checkpoint.py.

python -m tests.workers.legs CONFIG FOLDER PRECISION RUN:STAGE:LAST_STEP…

Legs of one RUN follow on each other; each run has a folder of its own in FOLDER.

Rank 0 prints a JSON object for each leg: losses by step and a digest of weights, moments and counters.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from pipeline import config, world
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.classify import Classification, build_model
from pipeline.train.checkpoint import Checkpoints, State
from pipeline.train.engine import Engine, make_deterministic
from pipeline.train.optim import lr_at


def digest(engine: Engine) -> str:
    whole = hashlib.sha256(str(engine.adam_steps()).encode())
    for name, tensor in sorted(engine.weights().items()):
        whole.update(name.encode() + tensor.numpy().tobytes())
    for name, moment, tensor in engine.moments():
        whole.update(f"{name} {moment}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def main() -> None:
    path, folder, precision, *legs = sys.argv[1:]
    here = world.start()
    make_deterministic()
    for leg in legs:
        run, stage, last_step = leg.split(":")
        settings = config.load(path, [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
        shards = ShardSet(*settings.data.train_paths)
        torch.manual_seed(settings.run.seed)
        task = Classification(build_model(settings.model, settings.image.size, 10))
        checkpoints = Checkpoints(Path(folder, run), here, settings.identity())
        folder_found = here.from_first(checkpoints.find("auto", []) if here.is_first else None)
        found = checkpoints.open(folder_found) if folder_found else None
        state = found.state if found else State()
        if found:
            task.model.load_state_dict(found.weights())
        feed = TrainFeed(settings, shards, here, first_step=state.step, drop_path_rates=task.drop_path_rates)
        engine = Engine(settings, task, here, feed.deal.accumulation)
        if found:
            found.restore(engine)
        losses = {}
        while state.step < int(last_step):
            lr = lr_at(state.step, peak=1e-3, floor=1e-5, start=1e-6, warmup_steps=4, total_steps=20)
            outcome = engine.step(feed.next(), step=state.step, lr=lr)
            losses[state.step] = outcome.loss
            state.advance(outcome.applied)
        feed.close()
        checkpoints.save(state, engine)
        report = {"run": run, "losses": losses, "digest": digest(engine)}
        if here.is_first:
            print(json.dumps(report), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
