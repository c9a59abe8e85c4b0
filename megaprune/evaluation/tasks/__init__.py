"""Task files of lm-evaluation-harness for benchmarks that lie beside them, or in a folder, as JSON lines."""
