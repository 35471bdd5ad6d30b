"""Scripts that measure the job; README.md says what each one does."""
