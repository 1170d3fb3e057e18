"""Images as torchvision would hand them to a network, as uint8; texts as tokens."""
