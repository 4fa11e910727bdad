"""LoRA, usable by itself: named low-rank adapters on the linear layers of a Transformers (or any torch) model.

manager = AdapterManager(model)
manager.add("math", LoraSpec(r=8, alpha=16, target_modules=["q_proj", "v_proj"]), seed=0)
manager.activate("math")
...                                     # train manager.parameters("math").values()
manager.save("math", directory, base_model_name="facebook/opt-125m")     # PEFT loads it
manager.remove("math")                  # the model is what it was
"""

from shared.specs import LoraSpec
from worker.lora.format import read_adapter, write_adapter
from worker.lora.layer import LoRALinear
from worker.lora.manager import AdapterManager
from worker.lora.routing import Routing
from worker.lora.spec import AdapterSpec, LoadedAdapter
from worker.lora.targets import linear_leaf_names, preset_leaf_names, resolve_targets

__all__ = [
    "AdapterManager",
    "AdapterSpec",
    "LoRALinear",
    "LoadedAdapter",
    "LoraSpec",
    "Routing",
    "linear_leaf_names",
    "preset_leaf_names",
    "read_adapter",
    "resolve_targets",
    "write_adapter",
]
