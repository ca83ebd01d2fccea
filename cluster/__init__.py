"""A sweep on a cluster: `slurm`, `lsf`, `kuberay` and `ray_up` submit it, `job` runs it, `node` is one machine of it.

`submission` is what the launchers have in common, `allocation` what a scheduler says of a job, `sweep` the command that
begins a sweep or goes on with it.
"""
