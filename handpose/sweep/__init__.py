"""A sweep, from the search space to the winner.

Its rooms, lowest first; each imports only from those above it here, and from handpose/search and handpose/schedulers:

    record/      what is written down: settings, events, segments of trials, provenance
    storage/     where it lies: checkpoints, the sweep's folder, its copy in an object store
    controller/  what is decided: the sweep's state as its events tell it, slots, quarantined nodes
    trainable/   what a worker runs: a segment of a trial, its checkpoints, its reports, what it costs
    analysis/    what the files tell afterwards: records for reports, importance, status, the stories of trials
    execution/   Ray: the cluster, its nodes, workers, and the bridge to Ray Tune
    budget/      how the whole time of a sweep is divided, and how much of it is used
    driver/      the process that runs a sweep: run, record, resume, shut down
    preflight/   what is tried out before a sweep, and the forecast
    selection/   the winner: confirmation over fresh seeds, selection, retraining
    audit/       whether all files of a sweep agree

`plan` puts them together: a sweep as it is going to run. `budgeted_plan` makes it fit into a budget, and
`resumed_budget` does so again when it is resumed. `why` prints the story of a trial, and `control` gives commands to a
running sweep. Only execution/ and trainable/ know Ray.
"""
