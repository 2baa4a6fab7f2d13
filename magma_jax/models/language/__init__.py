"""Language models, one file per kind."""
