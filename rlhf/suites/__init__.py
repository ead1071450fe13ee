"""Ask a model named suites of questions over the HTTP fronts of engines. The questions run in a separate process."""
