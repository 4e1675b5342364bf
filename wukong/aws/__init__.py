"""AWS: the deployment, what it costs, and the local service that stands in for Lambda."""
