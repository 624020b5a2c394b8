"""From label scores to a verdict: outlier statistics, calibration, abstention, the report."""
