"""Folders with networks of timm, for tests."""

import json


def stored(folder, timm, name, arguments, seed=0, **config):
    """Puts a network of timm with random weights and statistics into a folder; returns it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    module = timm.create_model(name, num_classes=7, **arguments)
    for key, value in module.state_dict().items():  # so that all of them matter
        if key.endswith("running_mean"):
            value.uniform_(-0.5, 0.5)
        elif key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
    save_file(
        {key: value.contiguous() for key, value in module.state_dict().items()},
        folder / "model.safetensors",
    )
    about = {"architecture": name, "model_args": arguments, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return module.eval()
