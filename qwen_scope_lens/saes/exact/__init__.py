"""The exact top-k encode and the gather decode. Internal: use `ScopeSAE`."""
