"""Settings of a run: schema, loading, rules; torch-free."""
