"""Results for people: tables, cards and pages."""
