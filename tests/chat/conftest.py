"""The tokenizer of the prepared workspace, and a model that calls the calculator."""

from pathlib import Path

import pytest

from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.workspace import Workspace


@pytest.fixture(scope="session")
def tokenizer(_prepared_workspace: Path) -> Tokenizer:
    return Tokenizer.load(Workspace(_prepared_workspace).tokenizer)
