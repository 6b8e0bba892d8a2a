"""What differs between jobs: data set, head, loss, metric."""
