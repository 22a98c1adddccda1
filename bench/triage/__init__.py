"""The first minutes on a GPU: everything that has to be known of this tree there, in processes that may die.

Nothing that runs in the coordinating process imports torch: what breaks a device, an interpreter or a compiler breaks a
child of its own.
"""
