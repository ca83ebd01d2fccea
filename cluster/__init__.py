"""Run a sweep on a cluster: `slurm`, `lsf`, `kuberay` and `ray_up` submit it, `job` runs it, `node` starts one machine.

`submission` has the parts that the launchers share, `allocation` the information from a scheduler about a job, and
`sweep` the command that starts or resumes a sweep.
"""
