"""Requests through an engine: workloads, scheduler, KV cache, routers, faults; exact and fast."""
