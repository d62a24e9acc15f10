"""A taskset for verifiers 0.4, as a user writes it: double a number."""

import verifiers.v1 as vf

__all__ = ["DoublingTaskset"]


class Row(vf.TaskData):
    answer: str


class Doubling(vf.Task[Row]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        # The recorded trace has log-probabilities with four digits after the point.
        trace.info["logprobs"] = list(trace.nodes[-1].logprobs)
        return float((trace.last_reply or "").strip() == self.data.answer)


class DoublingTaskset(vf.Taskset[Doubling, vf.TasksetConfig]):
    def load(self) -> list[Doubling]:
        rows = [Row(prompt=f"{n}+{n}=", answer=str(2 * n)) for n in range(110, 210)]
        return [Doubling(row, self.config.task) for row in rows]
