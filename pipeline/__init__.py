"""Streaming, fault-tolerant pretraining of vision backbones. docs/architecture.md is the map."""
