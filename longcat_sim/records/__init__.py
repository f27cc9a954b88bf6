"""What was seen: measurements, spans, routing traces and request records."""
