"""Ray: the cluster and its nodes, workers, and the bridge between Ray Tune and the controller.

What is not public in Ray is used in `ray_internals` only.
"""
