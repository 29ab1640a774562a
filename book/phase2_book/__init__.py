"""The book's tools: `exporter` writes the package from the notebooks, `execute` runs them."""
