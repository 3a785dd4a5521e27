"""The measures, one module per room; `benchmarks.registry` lists them. Each imports its peers only while it runs."""
