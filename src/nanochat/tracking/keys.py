"""What metrics are called, in `metrics.jsonl`, in W&B and in every plot: one name each, given here.

Two tiers, as W&B's users are used to: `batch/*` describes one optimizer step and comes every `--log-every` steps,
`epoch/*` describes the model as it stands and comes with evaluations. The last evaluation is also `final/*`, in W&B's
summary, where it is a column of the table of runs.
"""

LOSS = "batch/loss"
SMOOTHED_LOSS = "batch/smoothed_loss"
GRADIENT_NORM = "batch/gradient_norm"
LR_MULTIPLIER = "batch/lr_multiplier"
MUON_MOMENTUM = "batch/muon_momentum"
TOKENS = "batch/tokens"
FLOPS = "batch/flops"
EPOCH = "batch/epoch"
SKIPPED_STEPS = "batch/skipped_steps"
TOKENS_PER_SECOND = "batch/tokens_per_second"
MFU = "batch/mfu"
STEP_SECONDS = "batch/step_seconds"
DATA_SECONDS = "batch/data_seconds"
TRAIN_SECONDS = "batch/train_seconds"
MEMORY_RESERVED = "batch/memory_reserved_GB"
MEMORY_ALLOCATED = "batch/memory_allocated_GB"
ITER_NUM = "batch/iter_num"

# What a clock and the machine decide; everything else is the same however often a run is stopped or repeated.
CLOCKED = (TOKENS_PER_SECOND, MFU, STEP_SECONDS, DATA_SECONDS, TRAIN_SECONDS, MEMORY_RESERVED, MEMORY_ALLOCATED)

BPB = "epoch/bpb"
SAMPLES = "epoch/samples"


def learning_rate(group: str) -> str:
    """The learning rate of one group of parameters."""
    return f"batch/lr/{group}"


def final(key: str) -> str:
    """The name in the summary of what was `epoch/…` at the last evaluation."""
    return f"final/{key.removeprefix('epoch/')}"
