"""Network layer: connection limits, access control, request bodies, request log."""
