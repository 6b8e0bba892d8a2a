"""Commands and the feed against hostile input: generators, a watched process for each trial, and verdicts."""
