"""Runs small enough for a test: what is trained, in flags, and the text it is made from."""

import json
import shlex
from pathlib import Path

from cluster_account import Account

from texts import small_texts

# What a shell, a job script and srun each would like to read in their own way.
TEXTS = """it's "my own" $HOME text; (really) *\\n"""

MODEL = shlex.split(
    """--vocab-size 320 --depth 2 --aspect-ratio 16 --head-dim 16 --sequence-len 64 --lanes 4 --pool-size 8 --workers 1
    --total-batch-size 512 --device-batch-size 4 --no-scale-hyperparameters --weight-decay 0 --dtype float32
    --log-every 1 --eval-every 0 --eval-tokens 1024 --device cpu"""
)
CHAT = shlex.split(
    """--mid.tasks arithmetic:200 identity --mid.num-steps 4 --mid.lanes 4 --mid.pool-size 8 --mid.eval-tokens 1024
    --mid.log-every 1 --sft.tasks arithmetic:100 --sft.num-steps 4 --sft.lanes 4 --sft.pool-size 8 --sft.log-every 1
    --sft.eval-tokens 1024 --sft.batch-fraction 1
    --eval.tasks arithmetic --eval.max-problems 8 --eval.max-new-tokens 8"""
)
# Whole, in a few steps.
SHORT = ["--num-steps", "8", *MODEL, *CHAT]
# Long enough to be stopped while it trains; it ends there.
LONG_STEPS = 400
LONG = ["--stages", "corpus,tokenizer,tokenize,base", "--num-steps", str(LONG_STEPS), *MODEL]


def give_texts(account: Account) -> Path:
    """Put the text into the user's scratch folder, in a folder of a difficult name."""
    folder = account.scratch / TEXTS
    lines = [json.dumps({"text": text}) for text in small_texts()]
    account.write(folder / "texts.jsonl", "\n".join(lines) + "\n")
    return folder
