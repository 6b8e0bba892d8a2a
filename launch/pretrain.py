"""Pretrain a backbone.

deepspeed launch/pretrain.py --config configs/pretrain/NAME.yaml [--set key=value …]
"""

from launch import command
from launch.start import start

if __name__ == "__main__":
    command.run(lambda: start("launch/pretrain.py", "Pretrain a backbone.", fine_tuning=False))
