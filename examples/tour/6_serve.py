"""Serve: two adapters by name over one base model, for any client of OpenAI's API.

python examples/tour/6_serve.py

`textpolicy serve --adapter runs/one --adapter runs/two` does this from a shell.
"""

import tempfile
import threading
from pathlib import Path

from openai import OpenAI

import textpolicy as tp
from textpolicy.adapters import adapted_copy
from textpolicy.serving.app import create_app
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.server import running_server


def ask(address: str) -> None:
    """Do what a program elsewhere does: it knows an address and a name."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    for model in client.models.list():
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "347+185="}],
            temperature=0,
            max_tokens=6,
        )
        print(f"{model.id} answers {answer.choices[0].message.content!r}")


def main() -> None:
    base, tokenizer = tp.load_model("tiny")
    served = ServedEngine(base, tokenizer)
    served.put("base", base, version=0)
    with tempfile.TemporaryDirectory() as folder:
        # What a run leaves in its folder `adapters`.
        path = Path(folder) / "trained.safetensors"
        model, _ = tp.load_model("tiny")
        tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=4)).publish(path)
        # The copy has the arrays of the base: an adapter costs only its own tensors.
        served.put("trained", adapted_copy(base, path), version=0)
    with running_server(create_app(served)) as address:
        client = threading.Thread(target=lambda: (ask(address), served.wake()))
        client.start()
        # MLX computes in this thread; the server's threads hand their requests over.
        served.run(until=lambda: not client.is_alive())


if __name__ == "__main__":
    main()
