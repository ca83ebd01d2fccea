"""A sweep, from the search space to the winner. What is where:

What is tried: `space` (which keys, over what), `distributions` (the values of a key), `searcher` (proposes; keeps the
study), `points` and `warm_start` (what is tried first, what earlier sweeps teach), `study` and `sampler_view` (where
Optuna keeps it, what a sampler sees).
Who goes on: `scheduler` (the configured one), `rules` (ASHA, median, none), `rungs` (of ASHA), `population`.
What happened: `events` (the file), `history` (what they lead to), `state` (a sweep while it runs), `retention` (its
checkpoints), `audit` (whether all files agree: `audit_events`, `audit_records` for what is written beside them,
`audit_results` for what comes after the trials).
How it runs: `plan` (all of it, from what was asked for), `run` (a sweep), `slots` (how many at a time), `runtime` (Ray,
started), `interpreter` (the paths it starts from), `privacy` (which keeps others out of it), `warm_up` (its workers,
started ahead), `worker_start` (detects that none starts), `tuning` (Tune asks the state), `stretch` (what a worker is
told), `trial` (what it trains), `saving` (its checkpoints), `checkpoint_files` (where they lie), `worker` (which it
leaves as it was), `worker_death` (the signal that ended one), `recorder` (trials.csv, logs, terminal), `status` (from
another shell), `resume` (going on), `settings`.
On a cluster: `nodes` (which there are, and what runs where), `node_health` (which of them are to blame), `worker_group`
(a trial on several workers), `group_trainer` (what starts them), `crew` (machines that share the retraining).
In a store: `store` (files there), `mirror` (the sweep's folder, copied to it), `stored_sweep` (a sweep as it lies
there, and the way back), `owner` (who runs it).
Before it: `preflight`, `probing` (points tried on a worker), `trial_cost` and `cost_watch` (what a trial costs),
`forecast` (what the sweep costs), `gpu_share` (how many trials a GPU takes).
After it: `confirm` (the finalists again, over seeds), `paired_means` (what that tells), `select` (the winner),
`retrain`, `provenance`, `reporting` (report.html), `reading` and `searched` (a sweep as its files tell of it),
`importance` (which parameters matter).
"""
