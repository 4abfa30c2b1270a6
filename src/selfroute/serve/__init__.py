"""Serving: an OpenAI-compatible gateway that answers on the device and hands over to the cloud when the model asks."""
