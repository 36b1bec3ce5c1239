"""From a quantized base and its adapter to a model that needs neither this project nor PEFT."""
