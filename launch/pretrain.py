"""Pretrains a backbone.

deepspeed launch/pretrain.py --config configs/pretrain/NAME.yaml [--set key=value …]
"""

from pipeline import cli
from pipeline.commands.train import start

if __name__ == "__main__":
    cli.run(lambda: start("launch/pretrain.py", "Pretrain a backbone.", fine_tuning=False))
