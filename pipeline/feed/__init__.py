"""From sample ids to batches on the device. The only importer of nvidia.dali."""
