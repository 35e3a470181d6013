"""The stages from a catalog and a log to evaluated recommendations."""
