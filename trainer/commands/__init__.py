"""The command lines: train, plan, verify, check-task, predict, study, report."""
