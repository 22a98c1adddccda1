"""The first minutes on a GPU: checks and measurements of this tree, each in a process that may die.

The coordinating process imports no torch: a fault that breaks a device, an interpreter or a compiler breaks one child.
"""
