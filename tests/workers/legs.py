"""One rank of a run trained in legs, each restored from the checkpoint of the one before; see test_checkpoint.py.

python -m tests.workers.legs CONFIG FOLDER PRECISION RUN:STAGE:LAST_STEP…

Legs of one RUN follow on each other; each run has a folder of its own in FOLDER.

Rank 0 prints a JSON object for each leg: losses by step and a digest of the checkpoint's weights, average, moments
and counters, which does not depend on how ranks shared them out.
"""

import hashlib
import json
import sys
from pathlib import Path

import safetensors.torch
import torch

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.classify import ClassificationTask, build_model
from pipeline.train.checkpoint import Checkpoint, Checkpoints, Retention, State
from pipeline.train.checkpoint_files import STATE, parse_range
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine, make_deterministic
from pipeline.train.saver import Saver
from pipeline.train.schedule import lr_at


def digest(folder: Path) -> str:
    state = json.loads((folder / STATE).read_text())["state"]
    whole = hashlib.sha256(f"{state['adam_steps']} {state['ema_steps']} {state['loss_scale']}".encode())
    for name in ("model", "ema"):
        for key, tensor in sorted(safetensors.torch.load_file(folder / f"{name}.safetensors").items()):
            whole.update(key.encode() + tensor.numpy().tobytes())
    shares = [safetensors.torch.load_file(path) for path in folder.glob("optimizer-*.safetensors")]
    ranges = {parse_range(key): tensor for share in shares for key, tensor in share.items()}
    for (name, start, _), tensor in sorted(ranges.items(), key=lambda item: item[0]):
        whole.update((name.encode() if start == 0 else b"") + tensor.numpy().tobytes())
    return whole.hexdigest()


def main() -> None:
    path, folder, precision, *legs = sys.argv[1:]
    here = world.start()
    make_deterministic()
    for leg in legs:
        run, stage, last_step = leg.split(":")
        config = load_config(path, [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
        shards = ShardSet(*config.data.train_paths)
        torch.manual_seed(config.run.seed)
        task = ClassificationTask(build_model(config.model, config.image.size, 10))
        checkpoints = Checkpoints(Path(folder, run), here, config.identity())
        folder_found = here.from_first(checkpoints.find("auto", []) if here.is_first else None)
        found = Checkpoint(folder_found) if folder_found else None
        state = found.state if found else State()
        if found:
            task.model.load_state_dict(found.weights())
        feed = TrainFeed(config, shards, here, first_step=state.step, drop_path_rates=task.drop_path_rates)
        engine = Engine(config, task, here, feed.blank)
        ema = Ema(engine, 0.9)
        if found:
            found.restore(engine, ema)
        losses = {}
        while state.step < int(last_step):
            lr = lr_at(state.step, config.optim, warmup_steps=4, total_steps=20)
            outcome = engine.step(feed.next(), step=state.step, lr=lr)
            if outcome.applied:
                ema.update()
            losses[state.step] = outcome.loss
            state.step += 1
            state.skipped += not outcome.applied
        feed.close()
        saver = Saver(checkpoints, Retention(), engine, ema, here)
        saver.save(state, safe_step=state.step)
        folder_saved = saver.finish()
        saver.close()
        if here.is_first:
            assert folder_saved
            print(json.dumps({"run": run, "losses": losses, "digest": digest(folder_saved)}), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
