"""The model registry: its versions, their files, promotion, lineage and imported weights."""
