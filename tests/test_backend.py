"""What mlx is told before it computes."""

import os
import subprocess
import sys

import pytest

NAMES = ("MLX_ENABLE_CACHE_THRASHING_CHECK", "MLX_CUDA_GRAPH_CACHE_SIZE")


@pytest.mark.parametrize("given", [{}, {"MLX_CUDA_GRAPH_CACHE_SIZE": "5"}])
def test_the_import_turns_a_limit_of_mlx_off_and_keeps_what_the_user_has_set(given):
    """On CUDA, mlx raises once a process has launched some 800 different sequences of kernels."""
    program = f"import os, textpolicy\nprint([os.environ[name] for name in {NAMES}])"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["0", given.get(NAMES[1], "2000")])
