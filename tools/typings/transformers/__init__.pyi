# A stub for the type checker: mlx-lm imports transformers, and reading its 2,600 files takes longer
# than checking all of ours. None of our types depends on them.
from typing import Any

def __getattr__(name: str) -> Any: ...
