"""What is studied: models, hardware, deployments, workloads and scenarios as frozen, checked data."""
