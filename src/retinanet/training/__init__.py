"""Training: options, recipes, plan, loop, run folder.

Nothing is imported here: the command line reads `retinanet.training.configuration` without loading torch.
"""
