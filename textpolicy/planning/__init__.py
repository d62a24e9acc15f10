"""What fits in memory, estimated before a model is loaded."""

from textpolicy.planning.adapter_plan import AdapterPlan, PlannedModule, plan_adapters
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory

__all__ = ["AdapterPlan", "MemoryPlan", "PlannedModule", "plan_adapters", "plan_memory"]
