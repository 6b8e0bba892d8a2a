"""Fine-tunes a registered model.

deepspeed launch/finetune.py --config configs/finetune/NAME.yaml --set init.model=models:/NAME@champion [--set …]
"""

from pipeline import cli
from pipeline.commands.train import start

if __name__ == "__main__":
    cli.run(lambda: start("launch/finetune.py", "Fine-tune a registered model.", fine_tuning=True))
