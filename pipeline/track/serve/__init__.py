"""A registered model that answers requests: what it is shown of an image, and what it returns."""
