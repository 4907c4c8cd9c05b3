"""Small copies of the hub's data sets, in the layout and with the columns of the real ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GSM8K_ANSWER = (
    "He has 12*3=<<12*3=36>>36 apples.\n"
    "At $.50 each that is 36*.5=$<<36*.5=18>>18, and with tax $<<18+1,000=1018>>1,018.\n#### 1,018"
)

# As the card of cais/mmlu has it: subsets, and the files of their splits.
MMLU_CARD = """---
configs:
- config_name: all
  data_files:
  - split: test
    path: all/test-*
  - split: validation
    path: all/validation-*
- config_name: auxiliary_train
  data_files:
  - split: train
    path: auxiliary_train/train-*
dataset_info:
- config_name: all
  splits:
  - name: test
    num_examples: 14042
---
# MMLU
"""


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"content": text, "role": ("user", "assistant")[index % 2]} for index, text in enumerate(contents)]


def mmlu_row(question: str, answer: int) -> dict[str, Any]:
    return {"question": question, "subject": "astronomy", "choices": ["sun", "moon", "star", "dust"], "answer": answer}


def arc_row(question: str, labels: str, key: str) -> dict[str, Any]:
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"id": question, "question": question, "choices": choices, "answerKey": key}


def write_smoltalk(root: Path) -> None:
    folder = root / "HuggingFaceTB--smol-smoltalk" / "data"
    system = [{"content": "Answer briefly.", "role": "system"}]
    for number in range(4):
        rows = [
            {"messages": chat(f"question {number}.{row}", "an answer"), "source": "smol-magpie"} for row in range(3)
        ]
        write_parquet(folder / f"train-0000{number}-of-00004.parquet", rows)
    rows = [
        {"messages": system + chat("a question", "an answer", "and then?", "then this"), "source": "rewrite"},
        {"messages": chat("unanswered", ""), "source": "rewrite"},
    ]
    write_parquet(folder / "test-00000-of-00001.parquet", rows)


def write_mmlu(root: Path) -> None:
    folder = root / "cais--mmlu"
    rows = [{"train": mmlu_row(f"auxiliary {row}?", row % 4)} for row in range(6)]
    write_parquet(folder / "auxiliary_train" / "train-00000-of-00001.parquet", rows)
    for split, size in {"test": 5, "validation": 2, "dev": 1}.items():
        rows = [mmlu_row(f"{split} {row}?", row % 4) for row in range(size)]
        write_parquet(folder / "all" / f"{split}-00000-of-00001.parquet", rows)
    (folder / "README.md").write_text(MMLU_CARD)


def write_gsm8k(root: Path) -> None:
    folder = root / "openai--gsm8k"
    for split, size in {"train": 4, "test": 3}.items():
        rows = [{"question": f"{split} {row}: how much?", "answer": GSM8K_ANSWER} for row in range(size)]
        write_parquet(folder / "main" / f"{split}-00000-of-00001.parquet", rows)
        write_parquet(folder / "socratic" / f"{split}-00000-of-00001.parquet", rows)


def write_arc(root: Path) -> None:
    for subset in ("ARC-Easy", "ARC-Challenge"):
        folder = root / "allenai--ai2_arc" / subset
        for split in ("train", "validation", "test"):
            rows = [
                arc_row(f"{subset} {split} letters", "ABCD", "C"),
                arc_row(f"{subset} {split} numbers", "1234", "2"),
                arc_row(f"{subset} {split} three", "ABC", "A"),
                arc_row(f"{subset} {split} five", "ABCDE", "E"),
            ]
            write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)


def write_all(root: Path) -> None:
    for write in (write_smoltalk, write_mmlu, write_gsm8k, write_arc):
        write(root)
