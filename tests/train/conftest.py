from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Lets a test choose a mixed precision, which Accelerate fixes once per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
