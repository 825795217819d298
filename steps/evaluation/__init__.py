"""What evaluate measures and shows: one file for each thing measured, one for what is written."""
