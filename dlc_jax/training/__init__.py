"""Fine-tuning on a kept subset: images/, lora/, and what both leave on disk."""
