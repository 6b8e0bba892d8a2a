"""Fine-tune a registered model.

deepspeed launch/finetune.py --config configs/finetune/NAME.yaml --set init.model=models:/NAME@champion [--set …]
"""

from launch import command
from launch.start import start

if __name__ == "__main__":
    command.run(lambda: start("launch/finetune.py", "Fine-tune a registered model.", fine_tuning=True))
