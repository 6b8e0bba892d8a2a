"""The tasks: what differs between runs in data, head, loss and metric."""
