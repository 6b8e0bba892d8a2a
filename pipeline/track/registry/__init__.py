"""The model registry: versions in and out, their files, promotion, lineage, imported weights."""
