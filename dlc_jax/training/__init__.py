"""Fine-tuning on a kept subset: images/, lora/, and what both share (checkpoints, SGD, order)."""
