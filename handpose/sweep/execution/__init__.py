"""Ray: the cluster and its nodes, worker processes, and the bridge between Ray Tune and the sweep controller.

Only `ray_internals` uses parts of Ray that are not public.
"""
