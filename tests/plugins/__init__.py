"""Plugins of pytest for the tests marked gpu: a time limit, the memory of one device, a device that is lost."""
