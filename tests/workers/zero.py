"""One rank of the comparison of ZeRO stages with plain PyTorch; see test_engine.py.

python -m tests.workers.zero CONFIG STEPS PRECISION STAGE…

Rank 0 prints a JSON object for each stage: losses, gradient norms, and in fp32 each tensor's relative L2 distance
from what single-process AdamW makes of the same batches.
"""

import json
import sys

import torch
from torch import Tensor, nn

from pipeline import world
from pipeline.config import Config, load_config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.classify import ClassificationTask, build_model
from pipeline.train.engine import Engine, make_deterministic
from pipeline.train.optim import parameter_groups
from pipeline.train.schedule import lr_at
from pipeline.world import World


def fresh_task(config: Config) -> ClassificationTask:
    torch.manual_seed(config.run.seed)
    return ClassificationTask(build_model(config.model, config.image.size, 10))


def learning_rate(config: Config, step: int) -> float:
    return lr_at(step, config.optim, warmup_steps=10, total_steps=50)


def plain_pytorch(
    config: Config, shards: ShardSet, steps: int, device: torch.device
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of an ordinary training loop that knows neither ranks nor DeepSpeed."""
    task = fresh_task(config)
    task.model.to(device)
    whole = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": None})})
    feed = TrainFeed(whole, shards, World(device=device), drop_path_rates=task.drop_path_rates)
    optimizer = torch.optim.AdamW(
        parameter_groups(task.model, config.optim), betas=config.optim.betas, eps=config.optim.eps
    )
    losses = []
    for step in range(steps):
        (batch,) = feed.next()
        loss = task.losses(task.model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        assert config.optim.clip_grad
        nn.utils.clip_grad_norm_(task.model.parameters(), config.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
    feed.close()
    return {name: tensor.cpu() for name, tensor in task.model.state_dict().items()}, losses


def with_engine(config: Config, shards: ShardSet, steps: int, here: World) -> tuple[dict[str, Tensor], list, list]:
    task = fresh_task(config)
    feed = TrainFeed(config, shards, here, drop_path_rates=task.drop_path_rates)
    engine = Engine(config, task, here, feed.blank)
    outcomes = [engine.step(feed.next(), step=step, lr=learning_rate(config, step)) for step in range(steps)]
    feed.close()
    assert all(outcome.applied for outcome in outcomes)
    assert engine.adam_steps() == steps
    weights = {name: tensor.cpu() for name, tensor in engine.weights().items()}
    return weights, [outcome.loss for outcome in outcomes], [outcome.grad_norm for outcome in outcomes]


def main() -> None:
    path, steps, precision, *stages = sys.argv[1:]
    here = world.start()
    make_deterministic()
    config = load_config(path)
    shards = ShardSet(*config.data.train_paths)
    expected, expected_losses = {}, []
    if here.is_first and precision == "fp32":
        expected, expected_losses = plain_pytorch(config, shards, int(steps), here.device)
    for stage in stages:
        overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        weights, losses, norms = with_engine(load_config(path, overrides), shards, int(steps), here)
        report = {"stage": int(stage), "losses": losses, "norms": norms}
        if expected:
            report["expected_losses"] = expected_losses
            report["distances"] = {
                name: ((weights[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()
            }
            report["key_biases"] = [name for name in expected if name.endswith("attn.kv.bias")]
            for name in report["key_biases"]:
                # A key's bias adds the same to all scores of a query, so its gradient is zero but for rounding, which
                # Adam blows up to full steps. The values' half is compared.
                ours, theirs = (state[name].chunk(2)[1] for state in (weights, expected))
                report["distances"][name] = ((ours - theirs).norm() / theirs.norm()).item()
        if here.is_first:
            print(json.dumps(report), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
