"""What each command does, in its signature: tyro turns parameters into flags and docstrings into help.

Imports are inside the functions, so that help never waits for torch.
"""

from collections.abc import Callable

from nanochat.commands import cluster, data, evaluate, experiment, models, run, tokenizer, tracking, train

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": run.demo,
    "speedrun": run.speedrun,
    "data builtin": data.builtin,
    "data local": data.local,
    "data adopt": data.adopt,
    "data download": data.download,
    "data azure": data.azure,
    "data subset": data.subset,
    "data rank": data.rank,
    "data tokenize": data.tokenize,
    "data conversations": data.conversations,
    "data inspect": data.inspect,
    "data verify": data.verify,
    "data transfer": data.transfer,
    "stage": data.stage,
    "tokenizer train": tokenizer.tokenizer_train,
    "tokenizer eval": tokenizer.tokenizer_eval,
    "train base": train.train_base,
    "train mid": train.train_mid,
    "train sft": train.train_sft,
    "eval base": evaluate.eval_base,
    "eval chat": evaluate.eval_chat,
    "chat": models.chat,
    "report": tracking.report,
    "runs": tracking.runs,
    "compare": tracking.compare,
    "sync": tracking.sync,
    "doctor": cluster.doctor,
    "status": cluster.status,
    "preflight": cluster.preflight,
    "export hf": models.export_hf,
    "experiment plan": experiment.plan,
    "experiment prepare": experiment.prepare,
    "experiment run": experiment.run,
    "experiment compare": experiment.compare,
}
