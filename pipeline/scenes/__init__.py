"""Composes small data sets for dense tasks: handwritten digits on photographs, with boxes, masks and label maps.

photographs ──crop──┐
scans of digits ────┴──compose──▶ Scene ──write_dataset──▶ ADE20K: image + label map
                                            └────────────▶ COCO: image + outlined objects
"""
