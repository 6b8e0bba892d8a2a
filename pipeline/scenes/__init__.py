"""Real pictures of small size to learn dense tasks from: handwritten digits on photographs, boxed, masked and mapped.

photographs ──crop──┐
scans of digits ────┴──compose──▶ Scene ──layouts──▶ ADE20K: image + map of classes
                                            └──────▶ COCO: image + outlined objects
"""
