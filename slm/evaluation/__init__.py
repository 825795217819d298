"""What evaluate measures, how it judges, and what it shows.

`metrics` lists every metric, `gates` holds them against bounds. `measure` runs `worker` for each
model in a process of its own: it measures `fidelity`, `speed`, `sanity`, `tasks` and the `harness`.
`report` and `summary` show the result.
"""
