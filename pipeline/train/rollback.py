"""Rolling back: a run whose loss has gone wrong returns to weights from before that, and goes on with later data."""

import logging
from collections.abc import Callable

from pipeline.train.checkpoint import Checkpoint
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.guard import Diverged, Guard
from pipeline.train.saver import Saver
from pipeline.world import World

log = logging.getLogger(__name__)


def roll_back(
    step: int,
    *,
    world: World,
    guard: Guard,
    saver: Saver,
    engine: Engine,
    ema: Ema | None,
    on_rollback: Callable[[int, int], None],
) -> int:
    """Returns to the newest regular checkpoint from before the trouble, after `step` consumed batches. Collective.

    The position in the data stays: the batches between are not trained on again. `on_rollback` is called on rank 0 with
    the checkpoint's step and the present one. Returns the checkpoint's step.

    Raises Diverged where the guard has rolled back too often, or where there is no checkpoint to return to.
    """
    saver.finish()
    saved = _find_checkpoint(saver, guard.safe_step, world)
    # Before anything else, so that no version from in between is registered should the run end here.
    if world.is_first:
        on_rollback(saved.state.step if saved else guard.safe_step, step)
    if saved is None:
        raise Diverged(
            f"step {step}: nothing to go back to, no checkpoint on the grid of train.save_every is as old as step "
            f"{guard.safe_step}: set train.save_every, or lower optim.lr"
        )
    assert saved.state.guard, "every save notes the guard"
    # The guard first: it raises where there have been too many rollbacks, and then nothing is to change.
    guard.roll_back(saved.state.guard)
    engine.load_weights(saved.weights())
    saved.restore(engine, ema)
    if world.is_first:
        log.warning(f"step {step}: back to the weights of {saved.folder}; the data since then is skipped")
        _remove_later_checkpoints(saver, saved.state.step, step)
    world.barrier()
    return saved.state.step


def _find_checkpoint(saver: Saver, safe_step: int, world: World) -> Checkpoint | None:
    folder = None
    if world.is_first:
        folder = saver.checkpoints.find_regular(saver.retention, safe_step)
    folder = world.from_first(folder)
    return Checkpoint(folder) if folder else None


def _remove_later_checkpoints(saver: Saver, saved_step: int, step: int) -> None:
    # They hold the weights that have just been given up.
    for other in saver.checkpoints.steps():
        if saved_step < other <= step:
            saver.checkpoints.remove(other)
