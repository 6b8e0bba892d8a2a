"""What a registered model says about images that nobody has labelled."""
