"""Human-readable results: tables, cards and pages."""
