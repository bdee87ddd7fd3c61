"""What differs between model families, the random-weight models of benchmarks, and the bundled model."""
