"""Task files of lm-evaluation-harness for benchmarks whose data are next to them or in a folder, as JSON lines."""
